"""What can be wrong with a run before anybody is asked: its place, and its data line by line."""

from __future__ import annotations

from pathlib import Path

from trainer_client.data.files import BadLine, read_records
from trainer_client.data.records import understand
from trainer_client.training.place import check_writable, look
from trainer_client.training.settings import TrainSettings


def look_first(settings: TrainSettings) -> None:
    """See that there is a place for the run, and that its data can be understood.

    Without the target's tokenizer, so before a worker is waited for. Raises
    :class:`trainer_client.errors.DataError` with the first line that is wrong, unless such lines
    are to be skipped, and :class:`trainer_client.training.identity.RunError`.
    """
    check_writable(settings.output)
    look(settings.output, resume=settings.resume)
    paths = [settings.data]
    if settings.validation and settings.validation_share is None:
        paths.append(Path(settings.validation))
    for path in paths:
        for record in read_records(path):
            try:
                if isinstance(record, BadLine):
                    raise record
                understand(record)
            except BadLine:
                if not settings.skip_bad_lines:
                    raise
