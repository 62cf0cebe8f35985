"""What the parts say by name: each log event and each error code, why it comes, and what to do.

``docs/troubleshooting.md`` is made from these tables, and a test holds them complete.
"""

from __future__ import annotations

from typing import NamedTuple


class Known(NamedTuple):
    """Why something is said, and what to do about it. An empty ``remedy`` means: nothing."""

    cause: str
    remedy: str = ""


#: How a request ends without a result (``RequestError.code``), and why a broker refuses a peer.
CODES = {
    "bad_request": Known(
        "The request itself is wrong: token ids outside the vocabulary, shapes, dtypes, or an "
        "encoding that the target does not offer.",
        "Read the text: it has both numbers. `draftmq status --json` shows what a model offers.",
    ),
    "damaged": Known(
        "A payload did not match its checksum. The client sends it again by itself.",
        "If it comes often, look for bad memory or a middlebox that changes bytes.",
    ),
    "unknown_model": Known(
        "Workers are attached, and none serves the model that the request names.",
        "Start a worker for that model, or name another (`train --model`).",
    ),
    "unknown_mapping": Known(
        "A worker was never told this vocab mapping. The broker offers it again by itself."
    ),
    "too_large": Known(
        "A reply or a mapping is over the size limit of a worker or of the broker.",
        "Shorten the batch (`--batch-size`, `--max-length`), or raise the limit that is named.",
    ),
    "over_window": Known(
        "A client sent more requests than its window. draftmq's client never does.",
        "Look at the program that sends them.",
    ),
    "target_failed": Known(
        "The target raised for this request, on each worker that was tried.",
        "Read the text and the worker's log (`target_failed`) for the traceback.",
    ),
    "lost_workers": Known(
        "The request was running on each of several workers when they died.",
        "Look at the workers' ends (out of memory?). A smaller batch may live.",
    ),
    "expired": Known(
        "The broker had no answer within the time that the client gave.",
        "The text tells where the request stood and for how long. Add workers, or give more time.",
    ),
    "deadline": Known(
        "The client had no answer within its `timeout`.",
        "The text tells the request's story: no broker reached, no worker, or a slow one.",
    ),
    "cancelled": Known("A request was cancelled before a worker began it."),
    "identity": Known(
        "A reply came that is not the one to this request, or of another target. It was not used.",
        "Two brokers or workers serve different weights under one name; see what changed.",
    ),
    "refused": Known(
        "Every broker refuses this client.",
        "The text has each broker's reason: a version, a key, or a newer process of this name.",
    ),
    "unusable": Known(
        "A reply was right and its tensors could not be made here, for want of memory say.",
        "Read the text; a smaller batch or prefetch needs less memory.",
    ),
    "version": Known(
        "The two ends speak different versions of the protocol.",
        "Install one version of draftmq on both: drain, then the broker, workers, trainers.",
    ),
    "fenced": Known(
        "A newer process has the same name, and this one is the older.",
        "End the older process, or give the two different names (`--name`).",
    ),
    "other_model": Known(
        "A worker serves other weights, layers or options under a name that is served already.",
        "Give it the same model as its pool, or another name (`--model-name`).",
    ),
    "wrong_port": Known(
        "A worker came to the broker's port for trainers, or a trainer to that for workers.",
        "Swap the two: workers take the broker's `--workers` (5556), trainers `--clients` (5555).",
    ),
    "foreign_name": Known(
        "A peer under keys says hello in a name that belongs to another key.",
        "Use the key that the name was made with, or let the peer choose its own name.",
    ),
}

#: Log events, by the part that says them.
EVENTS = {
    "the broker": {
        "listening": Known("It is ready; the fields are its addresses."),
        "client_joined": Known("A trainer rank said hello."),
        "client_disconnected": Known(
            "A rank's connection is gone; its requests go on for a while."
        ),
        "client_left": Known("A rank has left or was given up; `reason` says which."),
        "worker_joined": Known("A worker is attached and gets requests."),
        "worker_draining": Known("A worker leaves after what it holds."),
        "worker_left": Known(
            "A worker has left or was lost; what it ran goes to others.",
            "If `reason` is silence, look at its host and at the network.",
        ),
        "worker_refused": Known(
            "A worker describes its model in a way that its pool does not take.",
            "`reason` has both sides; see the code `other_model`.",
        ),
        "hedged": Known(
            "A request ran for much longer than expected and was given to a second worker too.",
            "Often for one worker: it is slow or stuck.",
        ),
        "request_failed": Known(
            "A request ended without a result.", "`code` is in the table of codes."
        ),
        "foreign_request": Known(
            "A client sent a request in the name of another. It was dropped.",
            "Two programs share a connection's name, or someone forges requests.",
        ),
        "false_mapping": Known(
            "A vocab mapping did not match its hash. It was not used.",
            "The client's memory or program is broken.",
        ),
        "unasked_answer": Known(
            "A worker answered what it had not been asked. It was dropped.",
            "Expected after a broker's restart; else the worker is broken or forged.",
        ),
        "wrong_message": Known(
            "A peer said what peers of this port do not say.",
            "Its ports are likely swapped: trainers go to `--clients`, workers to `--workers`.",
        ),
        "bad_message": Known(
            "Bytes came that are no message: damaged, cut, or of another program or version.",
            "`error` says what was wrong and `side` at which port.",
        ),
        "message_failed": Known(
            "The handling of one message raised; it cost that peer its connection.",
            "This is a fault of draftmq: please report it with the traceback.",
        ),
        "broker_failed": Known(
            "The broker's loop ended by an error, and the process ends.",
            "This is a fault of draftmq: please report it with the traceback.",
        ),
        "wrong_port": Known(
            "A worker came to the port for trainers, or a trainer to that for workers; it is told.",
            "See the code `wrong_port`.",
        ),
        "foreign_name": Known(
            "A peer under keys used a name of another key, and was refused.",
            "See the code `foreign_name`.",
        ),
        "key_refused": Known(
            "A peer's key is not on the allow list of that port.",
            "`draftmq keygen` made it? Add its public key to the list that `--allow` names.",
        ),
        "handshake_failed": Known(
            "A connection from `address` spoke no ZeroMQ, or without the right key: `why`.",
            "Harmless unless a peer of yours cannot attach; then give it the keys.",
        ),
        "cut_off": Known(
            "The broker cut a connection; `why` has the limit that it broke.",
            "A peer that is cut again and again is broken or hostile.",
        ),
        "allow_list_read": Known("An allow list was read again; `keys` says how many it has."),
        "allow_list_kept": Known(
            "An allow list could not be read; the last good one stays in force.",
            "Mend the file that `error` names.",
        ),
        "unencrypted": Known(
            "A port that other machines reach has no key.",
            "Use `--key` and `--allow`, or keep strangers out by the network.",
        ),
    },
    "a worker": {
        "attached": Known("A broker has welcomed it."),
        "no_broker": Known(
            "No broker has welcomed it for some seconds; `why` says what was tried.",
            "Is the broker running, and is this its port for workers? The worker goes on trying.",
        ),
        "draining": Known("It finishes what it holds, takes nothing new, and ends."),
        "refused": Known(
            "A broker will not work with it; `code` and `text` say why.",
            "`code` is in the table of codes.",
        ),
        "canary_passed": Known(
            "The target gave for a few prompts the same alone, together and by its reference; the "
            "worker attaches now."
        ),
        "target_gone": Known(
            "The target's engine, or another rank of it, has ended; the worker ends, and others "
            "get its requests.",
            "Look at the log of the engine, or of that rank, for the reason, and start the worker "
            "again.",
        ),
        "rank_follows": Known(
            "This process has a part of the target and runs it when rank 0 says so; rank 0 is the "
            "worker.",
        ),
        "leader_gone": Known(
            "Rank 0 of the target has ended without a word, so this rank ends too.",
            "Look at the log of rank 0; torchrun with --max-restarts starts all ranks again.",
        ),
        "target_failed": Known(
            "The target raised for a request; the traceback follows.",
            "Mend the target or the data. Other requests go on.",
        ),
        "batch_failed": Known(
            "A forward for several requests failed; they are computed one by one.",
            "Often for want of memory: lower `--coalesce-tokens`.",
        ),
        "bad_mapping": Known(
            "A vocab mapping could not be read. It was not used.",
            "The trainer that offered it is of another version, or broken: look at its log.",
        ),
        "damaged_mapping": Known(
            "A vocab mapping did not match its checksum; the worker asks for it again.",
            "If it comes often, look for bad memory or a middlebox that changes bytes.",
        ),
        "fingerprint_is_weak": Known(
            "The target shows no weights, so its fingerprint covers less than them.",
            "Give the object a `fingerprint`, or different weights may count as the same.",
        ),
        "compiling": Known("`--compile` is at work on this part."),
        "compiled": Known("`--compile` has ended."),
        "thread_failed": Known(
            "A thread of the worker died, and the process ends.",
            "This is a fault of draftmq or of the target: read the traceback.",
        ),
        "direct_off": Known(
            "Direct transfers are not possible here; replies go by wire.",
            "`why` says what is missing; see docs/direct.md.",
        ),
    },
    "a trainer": {
        "listening": Known("Its pages are at this address (`--http`)."),
        "welcomed": Known("A broker has welcomed it."),
        "refused": Known(
            "A broker will not work with it; `text` says why.", "Others may still serve it."
        ),
        "waiting": Known(
            "Nothing has come for a while; the fields say what is waited for.",
            "Is a broker reachable, and a worker of this model attached?",
        ),
        "unknown_mapping_wanted": Known(
            "A broker asked for a vocab mapping that this client does not have.",
            "Another program uses this client's name.",
        ),
        "damaged_reply": Known(
            "A reply did not match its checksum; the trainer asks for it again.",
            "If it comes often, look for bad memory or a middlebox that changes bytes.",
        ),
        "direct_failed": Known(
            "A direct transfer failed; the request was asked again by wire.",
            "If it comes often, `--direct off` avoids the detour; `why` says what broke.",
        ),
        "callback_failed": Known(
            "A callback on a request raised; the request is not affected.", "Mend the callback."
        ),
        "trace_not_written": Known(
            "`--trace` could not be written, on a full disk say. Training goes on.",
            "Make room; the trace has a gap.",
        ),
        "trace_without_broker": Known(
            "The broker could not be asked for its part of the trace.",
            "Is `--trace-broker` its HTTP address? The trace has the trainer's times alone.",
        ),
        "step": Known("How far the run is."),
        "initial_draft": Known(
            "What `--init-from` gave: the tokens of the vocabulary, and how many it knew."
        ),
        "held_out_left_out": Known(
            "Held-out samples gave no finite numbers, and were not measured.",
            "Look at the samples that are named.",
        ),
        "tokenizing": Known("The data is read for the first time; later starts find its tokens."),
        "regenerating": Known("How far `draftmq data regenerate` is."),
        "tokenized_elsewhere": Known(
            "Another process of this node reads the same data; this one waits for its tokens."
        ),
        "samples_left_out": Known(
            "A loss or gradient was not finite and `--skip-non-finite` allows that.",
            "Look at the samples that are named.",
        ),
        "verify_differs": Known(
            "Two workers gave for the same tokens what differs by more than rounding "
            "(`--verify-share`).",
            "One of the two serves something else than it says: start both again with their "
            "canaries on, and take it away.",
        ),
        "verify_alone": Known(
            "A sample that should be verified was answered twice by one worker: the pool has no "
            "other that is free for this run, so nothing is verified.",
            "Add a worker, or leave `--verify-share` away.",
        ),
        "settings": Known("What the run was started with; `run.json` keeps it."),
        "validation": Known("How the draft does on held-out samples (`--validation`)."),
        "curves_not_written": Known(
            "`curves.png` could not be drawn or written. Training goes on.",
            "Read `error`; the figures are in `metrics.jsonl`.",
        ),
        "metrics_not_written": Known(
            "A line of metrics could not be written, on a full disk say. Training goes on.",
            "Make room; the curves have a gap.",
        ),
    },
    "all": {
        "lines_left_out": Known(
            "Whoever reads the log stood still, and `count` lines were left out.",
            "Look at what the log is piped into.",
        ),
    },
    "workers and trainers": {
        "bad_message": Known(
            "Bytes came from a broker that are no message.",
            "Is it a broker, and of this version? See the code `version`.",
        ),
        "cannot_connect": Known(
            "A broker could not be reached, and why. It is tried again for ever.",
            "Look at address, port, keys and network.",
        ),
        "unencrypted": Known(
            "Tensors go to another machine without encryption.",
            "Use `--key` and `--broker-key` if others can read on that network.",
        ),
        "loop_failed": Known(
            "The connection's thread died; what waits for it fails.",
            "This is a fault of draftmq: please report it with the traceback.",
        ),
        "direct": Known("Which ways past the broker it offers, and why."),
        "channel_ready": Known("A direct channel stands."),
        "channel_left": Known(
            "The other end of a direct channel left while nothing was under way."
        ),
        "channel_broken": Known(
            "A direct channel broke; it is built anew, and replies go by wire meanwhile.",
            "Expected when a peer dies in the midst of a transfer.",
        ),
        "channel_given_up": Known(
            "A direct channel failed again and again; another way is used.",
            "`why` says what failed last.",
        ),
        "channel_error": Known(
            "A backend of direct transfers raised what it should not.",
            "This is a fault of draftmq: please report it with the traceback.",
        ),
    },
    "the chaos proxy": {
        "listening": Known("It is ready; the fields are its addresses."),
        "opened": Known("A connection passes through it."),
        "closed": Known("A connection has ended."),
        "refused": Known(
            "A fault refuses connections now.",
            "It ends as its script says, or by `DELETE /faults`.",
        ),
        "upstream_failed": Known(
            "What it passes connections to could not be reached.",
            "Is `--upstream` right, and does the broker run?",
        ),
        "cannot_accept": Known(
            "It cannot take connections now, for want of descriptors say.",
            "Raise the limit of open files (`ulimit -n`).",
        ),
        "connection_failed": Known(
            "A connection ended by an error of its own.",
            "This is a fault of draftmq: please report it with the traceback.",
        ),
        "injected": Known("A fault begins."),
        "ended": Known("A fault ends."),
    },
}
