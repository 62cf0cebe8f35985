"""Writes the table in ``faults.md``: ``python -m docs.faults_table``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

PATH = Path(__file__).with_name("faults.md")
_BEGIN, _END = "<!-- faults: begin -->\n", "<!-- faults: end -->\n"


@dataclass(frozen=True)
class Fault:
    """One row: what is injected, at which instant, what the user sees, and which test shows it."""

    what: str
    instant: str
    seen: str
    test: str


_TRAIN = "tests/integration/test_training.py"
_PROCESSES = "tests/integration/test_processes.py"
_HOSTS = "tests/hosts/test_hosts.py"
_DIRECT = "tests/integration/direct/test_faults.py"
_SEGMENTS = "tests/integration/direct/test_segments.py"
_BROKER = "tests/broker/core/test_machine.py"
_CLIENT = "tests/trainer_client/core/test_machine.py"
_INPUT = "tests/integration/test_bad_input.py"
_PROXY = "tests/broker/chaos/test_zeromq.py"
_DOORS = "tests/broker/keys/test_doors.py"
_KEYS = "tests/integration/test_security.py"
_CHAOS = "tests/chaos/test_chaos.py"
_PARTS = "tests/broker/core/test_parts.py"
_CLIENT_PARTS = "tests/trainer_client/core/test_parts.py"

FAULTS = (
    Fault(
        "SIGKILL of a worker, of the broker, of the trainer",
        "any step of a training run",
        "a slower step, or a resumed run; the same losses",
        f"{_PROCESSES}::test_killing_each_kind_of_peer_in_mid_run_changes_no_loss",
    ),
    Fault(
        "SIGTERM of workers, and new ones",
        "any step",
        "nothing",
        f"{_PROCESSES}::test_two_ranks_do_not_notice_workers_that_attach_and_detach",
    ),
    Fault(
        "SIGKILL, SIGSTOP, SIGTERM of each kind of peer, and everything below, together",
        "all through a training run",
        "slower steps; weights with the same bits",
        f"{_CHAOS}::test_a_draft_trained_through_faults_is_the_draft_of_an_undisturbed_run",
    ),
    Fault(
        "a worker vanishes",
        "while it computes",
        "its requests run elsewhere",
        f"{_TRAIN}::test_a_worker_that_vanishes_in_mid_run_changes_nothing",
    ),
    Fault(
        "the broker restarts on its address",
        "in mid-step",
        "a slower step",
        f"{_TRAIN}::test_a_broker_restarted_in_mid_run_changes_nothing",
    ),
    Fault(
        "one of several brokers stops",
        "with requests under way",
        "they go on with another",
        f"{_TRAIN}::test_requests_go_on_with_another_broker_when_one_stops",
    ),
    Fault(
        "any number of cuts of a worker's connection",
        "while it computes",
        "nothing: a worker that comes back clears its requests",
        f"{_BROKER}::test_any_number_of_cuts_of_a_healthy_worker_fails_no_request",
    ),
    Fault(
        "a client's connection is cut",
        "before its reply was sent",
        "the reply comes on the new connection",
        f"{_BROKER}::test_a_client_that_reconnects_gets_the_reply_on_its_new_connection",
    ),
    Fault(
        "a client's connection is cut",
        "after the reply was computed, before it was taken",
        "the resend is answered from the store, without another forward",
        f"{_BROKER}::test_an_answer_to_a_disconnected_client_is_kept_for_its_resend",
    ),
    Fault(
        "cut, stalled, cut short or damaged: the worker's connection, or the client's",
        "between two parts of a large reply",
        "a slower step: the rest of it comes, or the request runs again",
        f"{_PROXY}::test_a_fault_strikes_between_two_parts_of_a_reply",
    ),
    Fault(
        "a worker dies",
        "between two parts of its reply",
        "the request runs elsewhere; what had come is dropped",
        f"{_PARTS}::test_worker_dies_between_two_parts",
    ),
    Fault(
        "SIGTERM of a worker on a slow network",
        "while it computes",
        "nothing: it leaves when its answer has",
        "tests/integration/test_slow_network.py"
        "::test_a_worker_that_drains_on_a_slow_network_leaves_when_its_answer_has",
    ),
    Fault(
        "a client's connection is cut",
        "between two parts of its reply",
        "the request runs again, for the broker keeps no large reply",
        f"{_PARTS}::test_client_is_away_between_two_parts",
    ),
    Fault(
        "a part of a reply is damaged, missing, twice or cut short",
        "on its way to the client",
        "nothing of that reply is taken, and it is asked for again",
        f"{_CLIENT_PARTS}::test_a_part_is_not_sound",
    ),
    Fault(
        "an answer or its acknowledgement is lost",
        "on its way",
        "it is asked for again, and delivered once",
        f"{_BROKER}::test_a_resend_of_an_answered_request_is_answered_from_the_store",
    ),
    Fault(
        "an answer comes twice",
        "after a resend",
        "nothing: the second is dropped",
        f"{_CLIENT}::test_a_request_waits_for_the_welcome_and_its_reply_is_delivered_once",
    ),
    Fault(
        "a request takes down the workers that run it",
        "three times",
        "one error with the story: which workers, how long",
        f"{_BROKER}::test_a_request_that_took_down_three_workers_is_refused_with_its_story",
    ),
    Fault(
        "a worker is far slower than it was",
        "while it computes",
        "the request runs a second time elsewhere, the first answer wins",
        "tests/broker/core/test_hedges.py::"
        "test_it_runs_elsewhere_after_three_times_its_expected_time",
    ),
    Fault(
        "the target raises",
        "in a forward",
        "it is tried elsewhere; then an error with its story",
        f"{_INPUT}::test_a_target_that_raises_is_told_with_its_story",
    ),
    Fault(
        "a bit of a reply flips",
        "between worker and trainer",
        "it counts as lost, and is asked for again",
        f"{_CLIENT}::test_a_damaged_reply_counts_as_lost",
    ),
    Fault(
        "a bit of a request flips",
        "between trainer and worker",
        "it is sent again",
        f"{_CLIENT}::test_a_request_that_was_damaged_on_its_way_is_sent_again",
    ),
    Fault(
        "a bit of a header flips",
        "on any connection",
        "hello is said again; no request and no credit is lost",
        f"{_BROKER}::test_a_peer_whose_message_was_damaged_is_asked_to_begin_again",
    ),
    Fault(
        "a bit of a handshake flips",
        "while connecting",
        "it is begun again",
        f"{_PROXY}::test_a_handshake_that_was_damaged_is_begun_again",
    ),
    Fault(
        "cut, stall, throttle, delay, truncate, corrupt, half-close, refuse, blackhole",
        "between a trainer and the broker",
        "a slower step",
        f"{_PROXY}::test_requests_are_answered_through_a_fault",
    ),
    Fault(
        "file descriptors run out",
        "at the broker",
        "new peers wait; connected ones go on",
        f"{_DOORS}::test_a_broker_without_descriptors_goes_on",
    ),
    Fault(
        "file descriptors run out",
        "at a worker or a trainer, whose connection is cut",
        "it connects again when there are some, and the log says why it could not",
        "tests/integration/test_descriptors.py::"
        "test_a_worker_without_descriptors_goes_on_when_it_has_some",
    ),
    Fault(
        "clients ask for as many large replies as they may, and read nothing",
        "at the broker, with 1,000 others",
        "the others are served; memory stays within its formula",
        "tests/integration/test_memory.py::"
        "test_1000_clients_and_replies_of_256_mib_stay_within_the_formula",
    ),
    Fault(
        "the disk is full",
        "while a checkpoint is written",
        "one sentence; the older checkpoints stay",
        "tests/trainer_client/drafts/test_checkpoint.py::test_a_full_disk_leaves_the_older_checkpoints",
    ),
    Fault(
        "two processes use one name",
        "at hello",
        "the older is fenced off, and told",
        f"{_INPUT}::test_a_second_process_with_the_same_name_fences_off_the_first",
    ),
    Fault(
        "a worker or a client is restarted on a host whose clock is an hour behind",
        "at hello",
        "the new one serves, the old one is fenced off",
        "tests/integration/test_clocks.py"
        "::test_a_restarted_worker_with_a_clock_behind_serves_and_the_old_one_does_not",
    ),
    Fault(
        "the broker is restarted, and two processes of one name come back",
        "at hello, in either order",
        "the older is fenced off",
        "tests/broker/core/test_fencing.py::test_numbers_outlive_a_restart_of_the_broker",
    ),
    Fault(
        "another release's protocol",
        "at hello",
        "a refusal with both versions",
        f"{_INPUT}::test_another_protocol_version_is_refused_with_both_numbers",
    ),
    Fault(
        "other weights behind a model's name",
        "when the worker attaches",
        "the worker is refused, with what differs",
        f"{_INPUT}::test_a_worker_with_other_weights_is_refused",
    ),
    Fault(
        "a reply of another request, model or mapping",
        "at the client",
        "an error; the trainer never sees it",
        f"{_INPUT}::test_a_reply_with_another_identity_never_reaches_the_trainer",
    ),
    Fault(
        "garbage",
        "on any port",
        "nobody is hurt",
        f"{_INPUT}::test_garbage_on_a_port_hurts_nobody",
    ),
    Fault(
        "2,000 connections that say nothing",
        "at the broker",
        "an honest one is served",
        f"{_DOORS}::test_2000_connections_do_not_shut_out_an_honest_one",
    ),
    Fault(
        "a message without end",
        "before a hello",
        "the stranger is cut off; memory is bounded",
        f"{_DOORS}::test_a_message_that_never_ends_cannot_fill_the_memory",
    ),
    Fault(
        "a message without end",
        "from a peer with a session",
        "it is cut off within a second or two",
        f"{_DOORS}::test_a_peers_message_without_end_is_cut_off",
    ),
    Fault(
        "a message of very many frames",
        "from any peer",
        "it is cut off; the others wait while it is read",
        f"{_DOORS}::test_a_message_of_very_many_frames_costs_its_connection",
    ),
    Fault(
        "a client says that it has its replies, and takes none",
        "at the broker",
        "it is cut off before they are more than its share and one",
        f"{_DOORS}::test_a_peer_that_only_says_that_it_has_its_replies_is_cut_off",
    ),
    Fault(
        "a key is revoked",
        "while its worker computes",
        "the worker is cut off, its requests go to another",
        f"{_KEYS}::test_a_revoked_workers_requests_go_to_another",
    ),
    Fault(
        "a name is used with another's key",
        "at hello",
        "it is refused, and replies never reach it",
        f"{_KEYS}::test_replies_never_go_to_a_thief",
    ),
    Fault(
        "SIGKILL of a worker",
        "before or in a direct send",
        "the request runs elsewhere, by wire",
        f"{_DIRECT}::test_worker_is_killed",
    ),
    Fault(
        "SIGKILL of a worker",
        "after a direct send",
        "nothing",
        f"{_DIRECT}::test_worker_is_killed_after_the_send",
    ),
    Fault(
        "SIGSTOP of a worker, SIGCONT later",
        "in a direct send",
        "the limit, then the wire; its channel comes back",
        f"{_DIRECT}::test_worker_is_stopped_in_mid_send_and_continued_later",
    ),
    Fault(
        "SIGKILL of a trainer",
        "in a direct receive",
        "other trainers notice nothing",
        f"{_DIRECT}::test_client_is_killed_in_mid_receive",
    ),
    Fault(
        "a child of the trainer is forked, and ends",
        "while a channel is ready",
        "nothing",
        f"{_DIRECT}::test_a_forked_child_leaves_the_channel_alone",
    ),
    Fault(
        "the port of the rendezvous is closed, or silent",
        "while a channel connects",
        "replies go by wire",
        f"{_DIRECT}::test_the_rendezvous_port_is_blocked",
    ),
    Fault(
        "a direct reply is dropped",
        "between broker and trainer",
        "it is resent by wire; the channel comes back",
        f"{_DIRECT}::test_the_reply_is_dropped_by_a_proxy",
    ),
    Fault(
        "the rendezvous dies",
        "while connecting, and when ready",
        "by wire until it is back",
        f"{_DIRECT}::test_the_store_is_killed_while_connecting_and_when_ready",
    ),
    Fault(
        "a channel is cut 50 times",
        "between transfers",
        "one slower step each",
        f"{_DIRECT}::test_a_channel_is_cut_50_times_in_one_run",
    ),
    Fault(
        "a channel is cut",
        "in a transfer",
        "one slower step each",
        f"{_DIRECT}::test_a_channel_is_cut_in_mid_transfer",
    ),
    Fault(
        "SIGKILL of a worker",
        "in a send through shared memory",
        "its segment is free at once",
        f"{_SEGMENTS}::test_a_segment_is_free_when_the_worker_is_killed",
    ),
    Fault(
        "SIGKILL of a trainer",
        "in a receive through shared memory",
        "its segment is free at once",
        f"{_SEGMENTS}::test_a_segment_is_free_when_the_client_is_killed",
    ),
    Fault(
        "shared memory cannot be had, or the other end is another user's",
        "while a channel connects",
        "by wire, then by Gloo",
        f"{_SEGMENTS}::test_what_shared_memory_cannot_do_gloo_does",
    ),
    Fault(
        "the trainer is cut off from the broker",
        "for longer than the liveness limit, in mid-run",
        "a pause; weights with the same bits",
        f"{_HOSTS}::test_the_trainer_is_cut_off_from_the_broker_for_a_while",
    ),
    Fault(
        "a worker's host loses its power",
        "in mid-run, with no FIN",
        "its requests run elsewhere; weights with the same bits",
        f"{_HOSTS}::test_a_worker_goes_without_a_word_and_another_comes",
    ),
    Fault(
        "the host of the broker, of a worker, of the trainer gets another address",
        "in mid-run",
        "a pause; weights with the same bits",
        f"{_HOSTS}::test_a_host_gets_another_address",
    ),
    Fault(
        "packets pass one way only",
        "for longer than the liveness limit, in mid-run",
        "a pause; weights with the same bits",
        f"{_HOSTS}::test_nothing_passes_one_way_for_a_while",
    ),
    Fault(
        "packets come 20 ms late and one in twenty never",
        "from mid-run on",
        "slower steps; weights with the same bits",
        f"{_HOSTS}::test_packets_come_late_and_some_never",
    ),
    Fault(
        "all IPv4 addresses go, and IPv6 is left",
        "in mid-run",
        "a pause; weights with the same bits",
        f"{_HOSTS}::test_there_is_ipv6_and_nothing_else",
    ),
    Fault(
        "the name server of one of two brokers falls silent, and that broker ends",
        "in mid-run",
        "nothing; weights with the same bits",
        f"{_HOSTS}::test_one_of_two_brokers_loses_its_name_server",
    ),
    Fault(
        "SIGSTOP and SIGCONT of the broker, beside six clients on another host",
        "in mid-run",
        "a pause; all are served at once",
        f"{_HOSTS}::test_the_broker_stands_still_and_six_clients_wait",
    ),
    Fault(
        "the host of a worker or of the trainer gets another address",
        "between two direct transfers",
        "the next come by wire, then directly again",
        "tests/hosts/test_direct.py::test_transfers_follow_a_host_to_its_new_address",
    ),
)


def render(document: str) -> str:
    """The document with its table made anew."""
    lines = ["| fault | at which instant | what the user sees | test |", "|---|---|---|---|"]
    for fault in FAULTS:
        path, _, name = fault.test.partition("::")
        shown = f"`{name}` in [{Path(path).name}](../{path})"
        lines.append(f"| {fault.what} | {fault.instant} | {fault.seen} | {shown} |")
    wanted = _BEGIN + "\n".join(lines) + "\n" + _END
    return re.sub(f"{_BEGIN}.*?{_END}", lambda _: wanted, document, flags=re.DOTALL)


if __name__ == "__main__":
    PATH.write_text(render(PATH.read_text(encoding="utf-8")), encoding="utf-8")
