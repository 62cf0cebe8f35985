"""The simulation finds planted bugs; what it could not find it would not guard."""

from __future__ import annotations

import pytest

from broker.core import BrokerCore
from tests.sim.mutations import MUTATIONS
from tests.sim.planting import instead
from tests.sim.replay import play
from tests.sim.rude_mutations import RUDE_MUTATIONS
from tests.sim.schedule import FIRST_RUDE, make

#: The rarest needs a twin, a failover or a cancel at the right moment.
_SCHEDULES = 1000


def test_there_are_planted_bugs_in_every_core() -> None:
    assert {name.split("_")[0] for name in MUTATIONS} == {"broker", "worker", "client", "peers"}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_planted_bug_is_caught(name: str) -> None:
    with MUTATIONS[name]():
        caught = next((seed for seed in range(_SCHEDULES) if not play(make(seed))), None)
    assert caught is not None, f"{_SCHEDULES} schedules did not find that {name}"
    assert play(make(caught)), "it was the planted bug and nothing else"


@pytest.mark.parametrize("name", RUDE_MUTATIONS)
def test_bad_manners_find_what_is_believed(name: str) -> None:
    seeds = range(FIRST_RUDE, FIRST_RUDE + _SCHEDULES)
    with RUDE_MUTATIONS[name]():
        caught = next((seed for seed in seeds if not play(make(seed))), None)
    assert caught is not None, f"{_SCHEDULES} schedules did not find that {name}"
    assert play(make(caught)), "it was the planted bug and nothing else"


def test_a_planted_bug_in_a_method_that_is_gone_is_an_error() -> None:
    with pytest.raises(AttributeError), instead(BrokerCore, "_gone", lambda real: real):
        pass
