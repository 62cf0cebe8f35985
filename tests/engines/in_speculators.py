"""Runs in the engines' environment: speculators reads a draft, converts it and validates it.

Exits 1 on the first warning, whoever says it: a tensor that is skipped is only warned of.
"""

from __future__ import annotations

import sys
import tempfile
import warnings

from loguru import logger
from speculators.convert import convert_model


def main(draft: str, target: str) -> None:
    said: list[str] = []
    logger.add(lambda message: said.append(str(message).strip()), level="WARNING")
    with warnings.catch_warnings(record=True) as caught, tempfile.TemporaryDirectory() as output:
        warnings.simplefilter("always", UserWarning)
        convert_model(draft, target, "eagle3", output_path=output, validate_device="cpu")
    said += [str(one.message) for one in caught if issubclass(one.category, UserWarning)]
    if said:
        sys.exit("speculators warned:\n" + "\n".join(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
