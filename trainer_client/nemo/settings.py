"""What a recipe of NeMo AutoModel says of its remote target, in ``recipe_args``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def _urls(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(url) for url in value]


#: setting -> the client's option | what it must be. The first five are NeMo's own names.
_SETTINGS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "remote_urls": ("urls", _urls),
    "remote_url": ("urls", _urls),
    "remote_timeout": ("timeout", float),
    "remote_max_retries": ("max_retries", int),
    "remote_model": ("model", str),
    "remote_encoding": ("encoding", str),
    "remote_trim": ("trim", str),
    "remote_job": ("job", str),
    "remote_key": ("key", str),
    "remote_broker_key": ("broker_key", lambda value: value),
    "remote_direct": ("direct", str),
}


def remote_options(recipe_args: Any, *, rank: int) -> dict[str, Any]:
    """``urls`` and the options of :class:`BrokerTarget` that ``recipe_args`` asks for.

    ``recipe_args`` is NeMo's config node, or a mapping. The job is the run's output folder, so that
    its ranks are one job to the brokers. Raises ``ValueError`` for a setting that is not known.
    """
    given = _plain(recipe_args)
    unknown = [name for name in given if name.startswith("remote_") and name not in _SETTINGS]
    if unknown:
        raise ValueError(
            f"recipe_args has {', '.join(sorted(unknown))}, which nobody reads; known are "
            f"{', '.join(_SETTINGS)}"
        )
    options: dict[str, Any] = {}
    for name, (option, convert) in _SETTINGS.items():
        if given.get(name) is not None:
            options.setdefault(option, convert(given[name]))
    if not options.get("urls"):
        raise ValueError(
            "target_model_backend 'remote' needs recipe_args.remote_urls, the brokers' client "
            "endpoints, like [tcp://broker-host:5555]"
        )
    folder = given.get("output_dir")
    options.setdefault("job", str(Path(str(folder)).absolute()) if folder else "")
    return {"timeout": 120.0, "max_retries": 3, "rank": rank} | options


def _plain(node: Any) -> dict[str, Any]:
    to_dict = getattr(node, "to_dict", None)
    return dict(to_dict() if to_dict else node)
