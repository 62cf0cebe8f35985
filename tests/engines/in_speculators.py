"""Runs in the engines' environment: speculators reads a draft, converts it and validates it.

Exits 1 if anybody warns: tensors that are missing or unknown are only warned of.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings

from loguru import logger
from speculators.convert import convert_model

#: speculators 0.9.0 asks transformers 5 for a dtype by its old name, whatever the draft says.
HARMLESS = "`torch_dtype` is deprecated! Use `dtype` instead!"


class _Kept(logging.Handler):
    def __init__(self, kept: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._kept = kept

    def emit(self, record: logging.LogRecord) -> None:
        self._kept.append(record.getMessage())


def main(draft: str, target: str) -> None:
    said: list[str] = []
    logger.remove()
    logger.add(lambda message: said.append(str(message).strip()), level="WARNING")
    for name in ("", "transformers"):  # transformers' logger does not propagate
        logging.getLogger(name).addHandler(_Kept(said))
    with warnings.catch_warnings(record=True) as caught, tempfile.TemporaryDirectory() as output:
        warnings.simplefilter("always", UserWarning)
        convert_model(draft, target, "eagle3", output_path=output, validate_device="cpu")
    said += [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    if said := [one for one in said if one != HARMLESS]:
        sys.exit("speculators warned: " + "; ".join(said))
    print("converted and validated")


if __name__ == "__main__":
    main(*sys.argv[1:])
