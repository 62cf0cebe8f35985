"""The backend ``draftmq`` of speculators' data sets.

Their data set asks for a stored sample first, and never looks for an endpoint where it gets one: so
each is computed by a worker when it is read. The DataLoader's worker processes are what keeps
requests under way, one each (their ``--num-workers``).
"""

from __future__ import annotations

import logging
import os
from argparse import ArgumentParser, Namespace
from typing import Any

from torch import Tensor

from trainer_client.errors import BadRequestError, TargetFailedError
from trainer_client.speculators.layers import columns, default_layers, target_layers, wish_for
from trainer_client.targets.remote import RemoteEagle3TargetModel

try:
    from datasets import load_from_disk
    from hs_connectors import HiddenStatesBackend, HiddenStatesTransfer
    from speculators.train.recovery import SampleUnavailable
except ImportError as error:
    raise ImportError(
        f"trainer_client.speculators works beside vLLM's speculators, and here is none that can be "
        f"imported ({error}); install speculators, 0.9.0 is the release it was tried with"
    ) from error

_logger = logging.getLogger("draftmq.speculators")


class Transfer(HiddenStatesTransfer):
    """Hidden states of the samples of one of their data sets, each asked for as it is read.

    It is copied into the DataLoader's worker processes; each opens a client of its own when it
    reads its first sample. ``options`` are those of
    :class:`trainer_client.targets.remote.RemoteEagle3TargetModel`.
    """

    def __init__(
        self,
        urls: list[str],
        data_path: str,
        layers: tuple[int, ...] | None,
        *,
        fp8: bool = False,
        **options: Any,
    ) -> None:
        self._urls = urls
        self._data_path = data_path
        self._layers = layers
        self._fp8 = fp8
        self._options = options
        self._opened_by = 0

    def __getstate__(self) -> dict[str, Any]:
        plain = ("_urls", "_data_path", "_layers", "_fp8", "_options")
        return {name: getattr(self, name) for name in plain} | {"_opened_by": 0}

    def setup(self) -> None:
        """Open the client in this process, if it has none yet.

        Raises what the client raises where the workers' model is not what is trained for.
        """
        if self._opened_by == os.getpid():
            return
        self._rows = load_from_disk(self._data_path).with_format("torch")
        self._target = RemoteEagle3TargetModel(self._urls, **self._options)
        num_layers = self._target.model_info()["num_hidden_layers"]
        layers = default_layers(num_layers) if self._layers is None else self._layers
        self._wish = wish_for(layers, num_layers, fp8=self._fp8)
        self._columns = columns(layers, num_layers, self._wish)
        self._opened_by = os.getpid()

    def get_cached(self, file_idx: int) -> Any:
        """Sample ``file_idx``: ``token_ids`` [T], ``hidden_states`` [T, L + 1, H], none normed.

        A sample that no worker can take (too long, ids of another tokenizer, a target that fails
        on it) is their ``SampleUnavailable``, which they leave out and count. All other errors are
        raised: no endpoint is ever asked in the place of the brokers.
        """
        self.setup()
        ids: Tensor = self._rows[file_idx]["input_ids"].long()
        length = ids.new_tensor([ids.numel()])
        try:
            states = self._target.supervise(self._wish, ids, lengths=length).result().states
        except (BadRequestError, TargetFailedError) as error:
            _logger.warning("sample %d is left out: %s", file_idx, error)
            return SampleUnavailable(reason=str(error), counts_as_failure=True)
        assert states is not None  # by the wish
        return {"token_ids": ids, "hidden_states": states[:, self._columns]}

    def close(self) -> None:
        """End the client of this process, if it has one; the next read opens another."""
        if self._opened_by == os.getpid():
            self._target.close()
            self._opened_by = 0

    def get_generated(self, hs_transfer_params: dict[str, Any]) -> Any:
        """Never asked for: each sample is there when it is read."""
        raise RuntimeError("draftmq gives samples by get_cached, and has no endpoint of vLLM's")


@HiddenStatesBackend.register("draftmq")
class Backend(HiddenStatesBackend):
    """``--hidden-states-backend draftmq``."""

    @staticmethod
    def add_train_args(parser: ArgumentParser) -> None:
        """The brokers and what they want to know of a client."""
        add = parser.add_argument
        add("--draftmq", default="tcp://127.0.0.1:5555", help="Brokers, commas between.")
        add("--draftmq-model", default="", help="Which model, where the brokers have several.")
        add("--draftmq-key", default=None, help="This trainer's secret key (draftmq keygen).")
        add("--draftmq-broker-key", default=None, help="The broker's public key, or its file.")
        add("--draftmq-timeout", type=float, default=480.0, help="Seconds for one sample.")
        add("--draftmq-states", choices=("target", "fp8"), default="target", help="On the wire.")

    @staticmethod
    def add_launch_args(parser: ArgumentParser) -> None:
        """None: workers are launched by ``draftmq worker``."""

    @staticmethod
    def from_train_args(args: Namespace, data_path: str) -> Transfer:
        """From the parsed arguments of their training."""
        return Transfer(
            str(args.draftmq).split(","),
            str(data_path),
            target_layers(args),
            fp8=args.draftmq_states == "fp8",
            model=args.draftmq_model,
            key=args.draftmq_key,
            broker_key=args.draftmq_broker_key,
            timeout=args.draftmq_timeout,
            max_retries=0,
            job=str(getattr(args, "save_path", "") or ""),
            rank=int(os.environ.get("RANK", "0")),
        )

    @staticmethod
    def build_kv_transfer_config(args: Namespace) -> dict[str, Any]:
        """Raises ``SystemExit``: vLLM's server is not what serves the target here."""
        raise SystemExit("draftmq's workers serve the target: draftmq worker --target MODEL")
