"""Everything that can be set about a training run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from broker.numbers import check_numbers
from trainer_client.data.reading import Options, template_options
from trainer_client.eagle3.config import Family
from trainer_client.eagle3.draft import Attention
from trainer_client.training import identity
from trainer_client.training.prefetch import Depth
from trainer_client.watch.boards import check_boards

Turns = Literal["all", "last"]
Paths = Path | tuple[Path, ...]
Pairs = tuple[str, ...]
Differs = Literal["refuse", "warn"]
InitVocab = Literal["keep", "data"]


@dataclass(frozen=True)
class TrainSettings:
    """Everything that can be set about a run; each default with its reason."""

    #: Files, patterns, directories.
    data: Paths
    output: Path
    #: Passes over the data, unless ``max_steps`` ends the run first; SpecForge's range is 1 to 10.
    epochs: int = 1
    max_steps: int = 0
    #: Samples of one rank in one micro-batch.
    batch_size: int = 1
    #: Micro-batches of one rank for one optimizer step.
    accumulation: int = 1
    #: Samples of one optimizer step over all ranks; 0: batch size x accumulation x ranks of the
    #: first start. A resumed run keeps it on any number of ranks.
    global_batch: int = 0
    #: Tokens of a micro-batch in which samples follow one another without padding; 0: it has
    #: ``batch_size`` samples, padded to the longest. What a step learns from is the same.
    pack: int = 0
    #: SpecForge's default for chat data.
    max_length: int = 2048
    #: Which assistant turns have loss: all, or the last of each conversation.
    loss_on: Turns = "all"
    #: A file with the chat template to use in the place of the tokenizer's.
    chat_template: str = ""
    #: What the chat template is told, as ``name=value``; a value is JSON, or else a string.
    chat_template_args: Pairs = ()
    #: Leave out records that cannot be used, and count them by reason; else the first is an error.
    skip_bad_lines: bool = False
    #: ``eagle3.1`` has a norm for each aux state and feeds back what the head reads.
    draft: Family = "eagle3.1"
    #: A draft to begin from, whose network it is then: ours, NeMo's, SpecForge's, speculators'.
    init_from: str = ""
    #: The vocabulary is that draft's, or is chosen from the data; its head's rows follow.
    init_vocab: InitVocab = "keep"
    #: What EAGLE-3's authors and most published drafts use.
    draft_vocab_size: int = 32000
    #: 0: like a layer of the target.
    draft_intermediate_size: int = 0
    #: EAGLE-3's training-time test has 7 depths.
    ttt_depths: int = 7
    #: ``auto`` merges flash attention with the later depths' keys where padding is on the right.
    attention: Attention = "auto"
    #: NeMo AutoModel's and SpecForge's order of magnitude.
    learning_rate: float = 1e-4
    #: Share of the steps that warm up.
    warmup_share: float = 0.05
    weight_decay: float = 0.0
    #: What EAGLE's authors clip at; their loss is a sum over depths and ours a weighted mean, so it
    #: binds less here.
    max_grad_norm: float = 0.5
    #: Samples whose states, loss or gradient are not finite to leave out, and report; one more is
    #: an error.
    skip_non_finite: int = 0
    #: Requests under way beyond the one that is waited for; ``auto`` finds what keeps the trainer
    #: from waiting, within ``prefetch_mib`` and the brokers' windows.
    prefetch: Depth = "auto"
    #: Room for results that wait for the trainer: 32 of 2,048 tokens, ``hidden`` at H=4096.
    prefetch_mib: int = 2048
    #: A share of the samples (0.05) or a data file that is not trained on: loss and accept length
    #: there are measured at each checkpoint, and the best checkpoint is kept.
    validation: str = ""
    #: Share of the samples that a second worker is asked for too; each costs one more forward.
    verify_share: float = 0.0
    #: Where two workers' answers differ by more than rounding: end the run, or go on and warn.
    verify_differs: Differs = "refuse"
    #: Boards that get the figures too, with commas between: tensorboard, wandb.
    log_to: str = ""
    seed: int = 0
    #: Steps between checkpoints; 0: only at the end.
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    resume: bool = False

    def __post_init__(self) -> None:
        check_numbers(
            self,
            above_0="epochs batch_size accumulation max_length draft_vocab_size ttt_depths "
            "learning_rate max_grad_norm prefetch_mib keep_checkpoints",
            not_negative="max_steps weight_decay checkpoint_every draft_intermediate_size "
            "global_batch skip_non_finite pack",
        )
        if 0 < self.pack < self.max_length:
            raise ValueError(
                f"pack must be 0 or at least max_length ({self.max_length} tokens), got "
                f"{self.pack}: no sample is cut in two"
            )
        if not -(2**32) < self.seed < 2**32:
            raise ValueError(f"seed must lie between -2**32 and 2**32, got {self.seed}")
        check_boards(self.boards)
        if self.prefetch != "auto" and self.prefetch < 1:
            raise ValueError(f"prefetch must be 'auto' or at least 1, got {self.prefetch}")
        if self.validation_share is not None and not 0 < self.validation_share < 1:
            raise ValueError(
                f"validation must be a share above 0 and below 1, or a file, got {self.validation}"
            )
        if not 0 <= self.verify_share <= 1:
            raise ValueError(
                f"verify_share must be a share from 0 to 1 of the samples, got {self.verify_share}"
            )
        if not 0 <= self.warmup_share < 1:
            raise ValueError(
                f"warmup_share must be at least 0 and below 1, got {self.warmup_share}"
            )

    @property
    def validation_share(self) -> float | None:
        """The share of the samples that is held out; None for a file, or for nothing."""
        try:
            return float(self.validation)
        except ValueError:
            return None

    def reading(self, limit_tokens: int) -> Options:
        """How the data is read, for a target of this many positions (0: not known).

        Raises :class:`trainer_client.errors.DataError` for a template that cannot be read.
        """
        return Options(
            max_length=min(self.max_length, limit_tokens or self.max_length),
            skip_bad_lines=self.skip_bad_lines,
            loss_on=self.loss_on,
            template_options=template_options(self.chat_template, self.chat_template_args),
        )

    @property
    def boards(self) -> list[str]:
        """The names in ``log_to``."""
        return [name for name in self.log_to.split(",") if name]

    def shared(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run that it goes on with."""
        return {name: v for name, v in self.plain().items() if name not in identity.FREE}

    def plain(self) -> dict[str, Any]:
        """All settings, as JSON has them."""
        return {name: _plain(value) for name, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return str(value[0]) if len(value) == 1 else list(map(str, value))
    return str(value) if isinstance(value, Path) else value
