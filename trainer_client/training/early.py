"""What can be wrong with a run before anybody is asked: its place, and its data line by line."""

from __future__ import annotations

import itertools

from trainer_client.data.files import BadLine, blocks
from trainer_client.data.records import understand
from trainer_client.data.sources import Given, files_of
from trainer_client.training.place import check_writable, look
from trainer_client.training.settings import TrainSettings

#: Of each file: what is wrong with a file is mostly wrong with its beginning.
_LOOKED_AT_BYTES = 16 << 20


def look_first(settings: TrainSettings) -> None:
    """See that there is a place for the run, and that its data can be understood.

    Without the target's tokenizer, so before a worker is waited for; of a large file only the
    beginning, for all of it is read when its tokens are made. Raises
    :class:`trainer_client.errors.DataError` with the first line that is wrong, unless such lines
    are to be skipped, and :class:`trainer_client.training.identity.RunError`.
    """
    check_writable(settings.output)
    look(settings.output, resume=settings.resume)
    settings.reading(0)
    given: list[Given] = [settings.data]
    if settings.validation and settings.validation_share is None:
        given.append(settings.validation)
    for file in itertools.chain.from_iterable(map(files_of, given)):
        for block in blocks(file):
            for record in block.records():
                try:
                    if isinstance(record, BadLine):
                        raise record
                    understand(record)
                except BadLine:
                    if not settings.skip_bad_lines:
                        raise
            if block.position > _LOOKED_AT_BYTES:
                break
