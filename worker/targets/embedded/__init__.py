"""The embedded target: a small Llama-architecture language model, its tokenizer and its corpus.

The folder of this package is a model folder that `transformers` and the inference engines load.
`tests.embedded_making.make` makes everything in it; README.md says where the text comes from.
Importing this module loads no model: it only finds the folder and reads the text.
"""

from __future__ import annotations

import lzma
from importlib import resources
from pathlib import Path

#: Stands between two documents in corpus.txt.xz. Within a document each line is one paragraph.
DOCUMENT_SEPARATOR = "\n\n"

#: Every 20th document (the 20th, the 40th, ...) is held out: never trained on, by the target
#: or by the draft, so that it can serve for evaluation prompts.
HELDOUT_EVERY = 20


def folder() -> Path:
    """Return the folder that holds config.json, the weights, the tokenizer and the corpus."""
    return Path(str(resources.files(__name__)))


def documents(corpus_file: Path | None = None) -> list[str]:
    """Return all documents of the corpus in their order; each line of one is a paragraph.

    Reads the shipped corpus.txt.xz, or the file named (same format).
    """
    packed = (corpus_file or folder() / "corpus.txt.xz").read_bytes()
    return lzma.decompress(packed).decode("utf-8").split(DOCUMENT_SEPARATOR)


def split(all_documents: list[str]) -> tuple[list[str], list[str]]:
    """Split documents into those to train on and those held out (every 20th)."""
    heldout_documents = all_documents[HELDOUT_EVERY - 1 :: HELDOUT_EVERY]
    training_documents = [
        text for index, text in enumerate(all_documents) if (index + 1) % HELDOUT_EVERY
    ]
    return training_documents, heldout_documents


def corpus() -> str:
    """Return the text the target was trained on, documents separated by an empty line."""
    return DOCUMENT_SEPARATOR.join(split(documents())[0])


def heldout() -> str:
    """Return the text the target never saw, documents separated by an empty line."""
    return DOCUMENT_SEPARATOR.join(split(documents())[1])


def continuations_file() -> Path:
    """Return the file of beginnings that the target continued: JSONL with ``text``, packed."""
    return folder() / "continuations.jsonl.xz"
