"""The token cache: a data set is read once a node, into files that all processes map.

An entry is a directory named by a hash of all that decides its tokens: content of the files,
tokenizer, options, versions. It is made in a directory of another name, under a lock that the
kernel lets go of when its holder dies, and renamed when it is whole. Whoever wants the same waits
for the lock and then finds it. Whoever uses an entry holds a shared lock on it, so that it is not
cleaned away below.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer_client.data.building import Built, Told, build
from trainer_client.data.contents import Contents
from trainer_client.data.reading import Options
from trainer_client.data.samples import ENTRY, WORD, Dataset, File, Known
from trainer_client.errors import DataError

#: Raised when the same data would give other tokens, or lie there in another form.
_FORM = 1
#: Where the cache is, and how many GiB of entries that nobody uses it keeps.
DIRECTORY, LIMIT = "DRAFTMQ_DATA_CACHE", "DRAFTMQ_DATA_CACHE_GIB"
_LIMIT_GIB = 64.0
_GIB = 1 << 30
_WORDS, _ENTRIES, _COUNTS, _FACTS = "tokens.u32", "samples.bin", "counts.npy", "facts.json"
#: Between two looks at a lock that another process holds: what it waits for takes seconds.
_LOOK_S = 0.1


def directory() -> Path:
    """Where the cache is."""
    said = os.environ.get(DIRECTORY)
    if said:
        return Path(said)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "draftmq" / "tokens"


def known_contents() -> Contents:
    """Content hashes of files, which are remembered in the cache."""
    return Contents(directory() / "contents")


def _limit_bytes() -> int:
    said = os.environ.get(LIMIT, "")
    try:
        limit = float(said or _LIMIT_GIB)
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        raise DataError(f"{LIMIT} is {said!r}; a number of GiB is wanted")
    return int(limit * _GIB)


def cached(
    files: Sequence[Path],
    tokenizer: Any,
    options: Options,
    *,
    told: Told = lambda progress: None,
    waits: Callable[[], None] = lambda: None,
) -> Dataset:
    """The samples of these files, from the cache, where they are put if nobody has yet.

    ``told`` hears how far reading is, and ``waits`` that another process reads the same. Raises
    what :func:`trainer_client.data.building.build` raises, and :class:`DataError` where the cache
    cannot be written.
    """
    place, contents = directory(), known_contents()
    key = _key([contents.hash(file) for file in files], tokenizer, options)
    paths = [str(file) for file in files]
    with _writing(place):
        place.mkdir(parents=True, exist_ok=True)
    found = _open(place / key, paths)
    if found is not None:
        return found
    with _locked(place / f"{key}.lock", waits) as alone:
        found = _open(place / key, paths)
        if found is not None:
            return found
        with _writing(place):
            if alone:  # what lies there unfinished is a dead process's, or was cut
                _remove_all(place.glob(f"{key}*"), but=f"{key}.lock")
            _make(place, key, files, tokenizer, options, told)
            found = _open(place / key, paths)
    if found is None:
        raise DataError(f"{place / key} was written and cannot be read; is its disk whole?")
    clean(_limit_bytes(), spare=key)
    return found


def _make(
    place: Path,
    key: str,
    files: Sequence[Path],
    tokenizer: Any,
    options: Options,
    told: Told,
) -> None:
    """Write an entry, which is seen when it is whole."""
    unfinished = place / f"{key}.unfinished-{os.getpid()}"
    unfinished.mkdir()
    try:
        with (unfinished / _WORDS).open("wb") as words, (unfinished / _ENTRIES).open("wb") as rows:
            built = build(files, tokenizer, options, words, rows, told)
        np.save(unfinished / _COUNTS, built.known.counts)
        (unfinished / _FACTS).write_text(json.dumps(_facts(built)))
        with contextlib.suppress(FileExistsError):  # where there are no locks: as good as ours
            unfinished.rename(place / key)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _remove_all(paths: Iterable[Path], but: str) -> None:
    for path in paths:
        if path.name != but:
            shutil.rmtree(path, ignore_errors=True)


def _facts(built: Built) -> dict[str, Any]:
    facts = asdict(built) | {"form": _FORM}
    facts["known"].pop("counts")
    return facts


def _open(entry: Path, paths: Sequence[str]) -> Dataset | None:
    """An entry's samples, with a shared lock on it for as long as they are used; None where it
    is not there, or not whole.
    """
    try:
        held = os.open(entry, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        with contextlib.suppress(OSError):  # a file system without locks is trusted
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
        facts = json.loads((entry / _FACTS).read_text())
        counts = np.load(entry / _COUNTS)
        words = np.memmap(entry / _WORDS, WORD, "r")
        entries = np.memmap(entry / _ENTRIES, ENTRY, "r")
        if (len(entries), len(words)) != (facts["n_samples"], facts["known"]["n_tokens"]):
            raise ValueError("it was cut")
        files = tuple(
            File(path, each["kind"]) for path, each in zip(paths, facts["files"], strict=True)
        )
        known = Known(**facts["known"], counts=counts)
        rest = [facts[name] for name in ("truncated", "without_loss", "left_out", "kinds")]
        with contextlib.suppress(OSError):  # a cache of somebody else's, which may be read
            os.utime(entry)  # the least recently used are cleaned away first
    except (OSError, ValueError, KeyError, TypeError):
        os.close(held)
        return None
    weakref.finalize(words, os.close, held)
    return Built(files, facts["n_samples"], known, *rest).dataset(words, entries)


@contextlib.contextmanager
def _locked(path: Path, waits: Callable[[], None]) -> Iterator[bool]:
    """Be the one who makes an entry; gives whether that is sure, as it is where there are locks."""
    with _writing(path.parent):
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        said, sure = False, True
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not said:
                    waits()
                said = True
                time.sleep(_LOOK_S)
                continue
            except OSError:
                sure = False
            break
        yield sure
    finally:
        os.close(lock)


@contextlib.contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Raise :class:`DataError` where the disk does not take what is written."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        do = "make room (draftmq data cache --clear)" if full else "make it writable"
        raise DataError(
            f"cannot write the token cache in {place}: {error.strerror}; {do}, or name another "
            f"directory ({DIRECTORY}=DIR)"
        ) from None


# -- what decides the tokens ----------------------------------------------------------------------


def _key(contents: Sequence[str], tokenizer: Any, options: Options) -> str:
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "tokenizers")}
    said = {
        "form": _FORM,
        "contents": list(contents),
        "tokenizer": _of_tokenizer(tokenizer),
        "options": asdict(options),
        "versions": versions,
    }
    text = json.dumps(said, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _of_tokenizer(tokenizer: Any) -> Mapping[str, Any]:
    """All that a tokenizer is: its state where it is one of Rust, and what it says of itself."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocab: Mapping[str, int] = getattr(tokenizer, "get_vocab", dict)()
    begins = list(tokenizer("a", verbose=False)["input_ids"])  # a call may change its state
    return {
        "begins": begins,
        "class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        "state": backend.to_str() if backend is not None else sorted(vocab.items()),
        "special": sorted(map(str, getattr(tokenizer, "all_special_tokens", ()))),
        "named": {k: str(v) for k, v in getattr(tokenizer, "special_tokens_map", {}).items()},
        "chat_template": getattr(tokenizer, "chat_template", None),
    }


# -- cleaning -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What lies in the cache: a data set with one tokenizer."""

    path: Path
    files: tuple[str, ...]
    tokens: int
    nbytes: int
    #: seconds since the epoch
    used_at: float


def listed() -> list[Entry]:
    """All whole entries, the least recently used first."""
    found = []
    for path in directory().glob("*"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            facts = json.loads((path / _FACTS).read_text())
            nbytes = sum(file.stat().st_size for file in path.iterdir())
            names = tuple(each["path"] for each in facts["files"])
            tokens = int(facts["known"]["n_tokens"])
            found.append(Entry(path, names, tokens, nbytes, path.stat().st_mtime))
    return sorted(found, key=lambda entry: entry.used_at)


def clean(limit_bytes: int = 0, spare: str = "") -> list[Entry]:
    """Remove entries, the least recently used first, until the others are within a limit; gives
    what was removed. What a process uses is left, and the entry ``spare``.
    """
    there, gone = listed(), []
    total = sum(entry.nbytes for entry in there)
    for entry in there:
        if total <= limit_bytes:
            break
        if entry.path.name != spare and _remove(entry.path):
            total -= entry.nbytes
            gone.append(entry)
    _remove_unfinished()
    return gone


def _remove(path: Path) -> bool:
    """Remove an entry that nobody uses, so that it is never seen in part."""
    try:
        held = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        away = path.with_name(f"{path.name}.unfinished-{os.getpid()}")
        path.rename(away)
        shutil.rmtree(away, ignore_errors=True)
    except OSError:
        return False
    finally:
        os.close(held)
    return True


def _remove_unfinished() -> None:
    """Remove what killed processes left, and locks that nobody holds."""
    place = directory()
    for path in place.glob("*.unfinished-*"):
        key = path.name.partition(".")[0]
        with contextlib.suppress(OSError), _free(place / f"{key}.lock"):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _free(lock: Path) -> Iterator[None]:
    """Hold a lock that nobody else holds. Raises :class:`OSError` where somebody does."""
    held = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(held)
