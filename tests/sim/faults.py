"""Everything that can be done to the cluster: what callers want, and what goes wrong.

Each function is one kind of operation of a schedule; ``who`` names what it is done to. An operation
on something that is not there (any more) does nothing, so that a schedule from which others were
taken out still plays.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.sim.actors import ClientProcess, WorkerProcess
from tests.sim.peers import LINGER_S, BrokerProcess, PeerProcess, Process
from tests.sim.rude import NAMES, Crowd
from worker.core import Drain

if TYPE_CHECKING:
    from tests.sim.world import World


#: A process that was down is started again so long after the faults have stopped.
_RESTART_S = LINGER_S + 0.3
#: What a caller in a stopped process wants is looked at this often.
_RETRY_S = 0.1


# -- what a cluster is for --------------------------------------------------------------------


def start(world: World, who: str, role: str, **how: Any) -> None:
    """A peer is there; ``how`` is what its service would be given."""
    makers: dict[str, Callable[[int], Process]] = {
        "broker": lambda life: BrokerProcess(world, who, life, **how),
        "worker": lambda life: WorkerProcess(world, who, life, **how),
        "client": lambda life: ClientProcess(world, who, life, **how),
    }
    world.recipes[who] = makers[role]
    world.start(who)


def submit(world: World, who: str, label: int, nature: str, **how: Any) -> None:
    """A caller asks; in a process that is stopped, once that runs again."""
    client = world.process(who)
    if client is None:
        return
    if client.stopped:
        world.later(_RETRY_S, lambda: submit(world, who, label, nature, **how))
    else:
        world.submit(client, label, nature, **how)


def cancel(world: World, who: str, label: int) -> None:
    """The caller gives a request up."""
    ask = world.by_label.get(label)
    if ask is None or not ask.client.alive:
        return
    if ask.client.stopped:
        world.later(_RETRY_S, cancel, world, who, label)
    else:
        ask.client.cancel(ask)
        world.unfinished.discard(ask)


def drain(world: World, who: str) -> None:
    """A worker is asked to leave, as by SIGTERM; another takes its place later."""
    worker = world.process(who)
    if worker is not None:
        worker.receive(Drain("asked to"))


def leave(world: World, who: str, down_s: float) -> None:
    """A peer closes in good order and comes back in a new life."""
    process = world.process(who)
    if process is not None:
        process.leave()
        world.gone(process, LINGER_S + down_s)


# -- the network --------------------------------------------------------------------------------


def cut(world: World, who: str, broker: str) -> None:
    """The connection is reset; both ends soon know."""
    _sever(world, who, broker)


def half_open(world: World, who: str, broker: str, deaf: str) -> None:
    """The connection is gone, and ``deaf`` (peer, broker or both) never hears of it."""
    _sever(world, who, broker, peer_hears=deaf == "broker", broker_hears=deaf == "peer")


def _sever(world: World, who: str, broker: str, **hears: bool) -> None:
    process = world.process(who)
    if process is not None and (socket := process.sockets.get(broker)) and socket.connection:
        world.network.sever(socket.connection, **hears)


def partition(world: World, who: str, broker: str, for_s: float) -> None:
    """Nothing passes for a while; TCP brings what is not given up meanwhile."""
    world.network.part(who, broker)
    world.later(for_s, world.network.heal, who, broker)


def lag(world: World, who: str, broker: str, factor: float, for_s: float) -> None:
    """Messages take longer for a while."""
    world.network.lag[who, broker] = factor
    world.later(for_s, world.network.lag.pop, (who, broker), None)


def corrupt(world: World, who: str, broker: str, up: bool, where: list[str]) -> None:
    """The next messages are damaged in their header or in their payload."""
    world.saw("damage")
    world.network.damage.setdefault((who, broker, up), []).extend(where)


# -- the processes ------------------------------------------------------------------------------


def crash(world: World, who: str, down_s: float, quietly: bool) -> None:
    """A peer dies and is started again; ``quietly``, with its host: nobody is told."""
    process = world.process(who)
    if process is not None:
        world.crash(process, down_s, quietly=quietly)


def twin(world: World, who: str) -> None:
    """A second process with the same name starts while the first still runs.

    Not before every broker has welcomed the first: who comes first is the only thing that can tell
    which of the two is the newer.
    """
    process = world.process(who)
    if isinstance(process, PeerProcess) and all(
        link.broker for link in process.core.links.values()
    ):
        world.leftovers.append(process)
        world.saw("twin")
        world.start(who)


def stop(world: World, who: str, for_s: float) -> None:
    """The process does not run for a while, as after SIGSTOP; its connections stay."""
    process = world.process(who)
    if process is not None:
        world.saw("stop")
        process.stop()
        world.later(for_s, process.resume)


def jump(world: World, who: str, by_s: float) -> None:
    """The peer's monotonic clock jumps forward."""
    if who in world.clock_offsets:
        world.saw("jump")
        world.clock_offsets[who] += by_s
        if (process := world.process(who)) is not None:
            process.receive(process.tick)


def slow(world: World, who: str, factor: float, for_s: float) -> None:
    """The worker's target takes longer for a while."""
    worker = world.process(who)
    if isinstance(worker, WorkerProcess):
        worker.slowness = factor

        def recover() -> None:
            worker.slowness = 1.0

        world.later(for_s, recover)


def rude(
    world: World, who: str, seed: int, for_s: float, luck: random.Random | None = None
) -> None:
    """Peers come that keep to nothing, and are cut off after a while."""
    broker = world.process(who)
    if isinstance(broker, BrokerProcess):
        world.rude_names.update(NAMES)
        Crowd(world, broker, seed, luck).act(world.now + for_s)


KINDS: dict[str, Callable[..., None]] = {
    fault.__name__: fault
    for fault in (
        start,
        submit,
        cancel,
        drain,
        leave,
        cut,
        half_open,
        partition,
        lag,
        corrupt,
        crash,
        twin,
        stop,
        jump,
        slow,
        rude,
    )
}


def heal_everything(world: World) -> None:
    """The end of all faults: what is apart meets, what is stopped runs, what is down is started."""
    for pair in list(world.network.parted):
        world.network.heal(*pair)
    world.network.lag.clear()
    world.network.damage.clear()
    for process in world.everyone():
        process.resume()
    for worker in world.workers.values():
        worker.slowness = 1.0
    world.later(_RESTART_S, _start_all, world)


def _start_all(world: World) -> None:
    for name in world.recipes:
        if world.process(name) is None and not world.closing:
            world.start(name)
