"""Where targets come from: a model by name or path, or an object that the user's code makes."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from worker.errors import TargetError

if TYPE_CHECKING:
    import torch

    from worker.targets.contract import Target
    from worker.targets.huggingface import HuggingFaceTarget
    from worker.targets.parallel import ParallelTarget

EMBEDDED = Path(__file__).parent / "embedded"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def resolve(name: str) -> str:
    """What transformers loads for a target's or tokenizer's name: for ``embedded`` our folder."""
    return str(EMBEDDED) if name == "embedded" else name


def load_target(
    name: str,
    *,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    aux_layer_ids: Sequence[int] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    device_map: str | Mapping[str, Any] = "",
) -> HuggingFaceTarget:
    """A Hugging Face model as a target: an id, a folder, or ``embedded`` for the shipped one.

    ``device`` is a GPU if there is one, where it is empty. ``device_map`` (accelerate's, such as
    "auto") lays the layers on several devices instead.

    ``dtype`` is that of the checkpoint unless given ("float32", "bfloat16", "float16").
    Raises :class:`TargetError`, in one sentence that says what to do.
    """
    import torch

    from worker.targets.huggingface import HuggingFaceTarget

    where = _existing(name)
    options = {"trust_remote_code": trust_remote_code, "revision": revision}
    wanted = _dtype(dtype, name, torch)
    if device_map:
        if device:
            raise TargetError(f"say either the device {device} or a device map, and not both")
        _require_accelerate("--device-map")
        model = load_model(name, where, wanted, options, placing={"device_map": device_map})
        _refuse_offloaded(name, model)
    else:
        model = _on(_device(device, torch), name, load_model(name, where, wanted, options))
    return HuggingFaceTarget(
        model, name=name, aux_layer_ids=aux_layer_ids, tokenizer=_tokenizer_of(name, where)
    )


def load_parallel_target(
    name: str,
    *,
    device: str = "",
    dtype: str | torch.dtype | None = None,
    aux_layer_ids: Sequence[int] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    size: int = 0,
) -> ParallelTarget:
    """This rank's part of a Hugging Face model that is cut over the ranks that torchrun started.

    ``size`` is how many there should be; 0: any number. Every rank must call this at the same time.
    Raises :class:`TargetError`, in one sentence that says what to do.
    """
    import torch
    from transformers import AutoConfig

    from worker.targets.contract import text_config
    from worker.targets.lowest import load_lowest
    from worker.targets.parallel import ParallelTarget
    from worker.targets.ranks import join

    where = _existing(name)
    _require_accelerate("--tp")
    wanted = _dtype(dtype, name, torch)
    options = {"trust_remote_code": trust_remote_code, "revision": revision}
    try:
        config = AutoConfig.from_pretrained(where, **options)
    except (OSError, ValueError) as error:
        raise TargetError(f"cannot load target {name!r}: {_first_line(error)}") from error
    if not getattr(text_config(config), "base_model_tp_plan", None):
        raise TargetError(
            f"transformers has no tensor parallel plan for target {name!r} "
            f"({config.model_type}); lay its layers on several devices with --device-map auto, "
            f"or serve it inside vLLM with --target vllm:{name} --tp N"
        )
    ranks = join(_device(device, torch).type, size)
    model = load_model(name, where, wanted, options, placing=_tensor_parallel())

    def lowest() -> HuggingFaceTarget:
        return load_lowest(where, name, wanted, options, config)

    return ParallelTarget(
        model,
        ranks=ranks,
        name=name,
        aux_layer_ids=aux_layer_ids,
        tokenizer=_tokenizer_of(name, where),
        lowest=lowest,
    )


def load_factory(
    reference: str,
    *,
    name: str = "",
    arguments: Mapping[str, Any] = MappingProxyType({}),
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Target:
    """The target that the user's ``package.module:callable`` makes.

    It is called with ``arguments`` by keyword, and with those ``options`` that were given (neither
    None nor empty): ``device``, ``dtype``, ``aux_layer_ids`` and the like, by these names. The
    current directory is on its path. Raises :class:`TargetError` that says what is missing, or
    which of them it does not take.
    """
    module_name, colon, attribute = reference.partition(":")
    if not (module_name and colon and attribute):
        raise TargetError(f"a target factory is 'package.module:callable', got {reference!r}")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise TargetError(
            f"target factory {reference!r}: cannot import {module_name} ({error}); is it "
            "installed, in the current directory, or on PYTHONPATH?"
        ) from error
    factory = getattr(module, attribute, None)
    if not callable(factory):
        has = "is not callable" if hasattr(module, attribute) else f"is not in {module_name}"
        raise TargetError(f"target factory {reference!r}: {attribute} {has}")
    given = dict(arguments) | {each: value for each, value in options.items() if value}
    try:
        inspect.signature(factory).bind(**given)
    except TypeError as error:
        raise TargetError(
            f"target factory {reference!r} cannot be called with "
            f"{', '.join(f'{each}={value!r}' for each, value in given.items()) or 'nothing'}: "
            f"{error}; give what it needs by --factory-arg KEY=VALUE, and leave away what it does "
            "not take"
        ) from None
    return as_target(factory(**given), name=name or attribute)


def compile_target(target: Target) -> None:
    """Have a target compile its forward, at once. Raises :class:`TargetError` where it cannot."""
    compile_forward = getattr(target, "compile_forward", None)
    if compile_forward is None:
        raise TargetError(
            f"target {target.name!r} cannot compile its forward; leave --compile away"
        )
    compile_forward()


def as_target(made: Any, *, name: str = "") -> Target:
    """A worker's target of anything with the co-located contract; one of ours as it is.

    Raises :class:`TargetError` that names the members that are missing.
    """
    from worker.targets.foreign import CONTRACT, OURS, ForeignTarget

    if all(inspect.getattr_static(made, member, None) is not None for member in OURS):
        return cast("Target", made)
    missing = [member for member in CONTRACT if not hasattr(made, member)]
    if not missing and not hasattr(made.model, "config"):
        missing = ["model.config"]
    if missing:
        raise TargetError(
            f"a {type(made).__name__} is no target: it has no {', '.join(missing)}; the contract "
            f"is {', '.join(CONTRACT)} with model.config"
        )
    return ForeignTarget(made, name or type(made).__name__)


def load_vllm_target(
    name: str,
    *,
    tensor_parallel: int = 1,
    device: str = "",
    dtype: str | None = None,
    aux_layer_ids: Sequence[int] | None = None,
    layers: Sequence[int] = (),
    trust_remote_code: bool = False,
    revision: str | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> Target:
    """A model that vLLM runs, by the name that :func:`load_target` takes.

    ``layers`` can be asked for beside the aux layers; ``options`` are those of ``vllm.LLM``. See
    :class:`worker.targets.vllm.target.VllmTarget`. Raises :class:`TargetError`, in one sentence.
    """
    if importlib.util.find_spec("vllm") is None:
        raise TargetError(
            f"'vllm:{name}' needs vLLM, and there is none here; pip install 'draftmq[vllm]', or "
            f"serve it with --target {name}"
        )
    import torch

    from worker.targets.vllm.target import VllmTarget

    where = resolve(name)
    loading = {"trust_remote_code": trust_remote_code, "revision": revision}
    shared = {"trust_remote_code": True} if trust_remote_code else {}
    return VllmTarget(
        where,
        name=name,
        aux_layer_ids=aux_layer_ids,
        layers=layers,
        tensor_parallel=tensor_parallel,
        dtype=_dtype(dtype, name, torch),
        device=str(_device(device, torch)),
        tokenizer=_tokenizer_of(name, where),
        options={**shared, **({"revision": revision} if revision else {}), **options},
        loading=loading,
    )


def load_model(
    name: str,
    where: str,
    dtype: Any,
    options: Mapping[str, Any],
    config: Any = None,
    placing: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """The model of a checkpoint by transformers; ``config`` in the place of its own. ``placing``
    says where its weights go, as ``from_pretrained`` takes it.

    Raises :class:`TargetError` in one sentence, also where the checkpoint lacks a tensor.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    model: Any
    loaded: Mapping[str, Any]
    wanted = {"dtype": dtype, "output_loading_info": True, **options, **placing}
    try:
        if config is None:
            config = AutoConfig.from_pretrained(where, **options)
        wanted["config"] = config
        try:
            model, loaded = cast(Any, AutoModelForCausalLM).from_pretrained(where, **wanted)
        except ValueError:
            if not hasattr(config, "text_config"):
                raise
            model, loaded = cast(Any, AutoModelForImageTextToText).from_pretrained(where, **wanted)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        if "trust_remote_code" in str(error) and not options["trust_remote_code"]:
            raise TargetError(
                f"target {name!r} brings Python code of its own, which would run here with all "
                "rights of this worker; read it, and say --trust-remote-code if it may (with "
                "--revision, so that it stays what you read)"
            ) from error
        raise TargetError(
            f"cannot load target {name!r}: {_first_line(error)}; give a folder with config.json "
            "and weights, a Hugging Face model id, or 'embedded'"
        ) from error
    _refuse_random_weights(name, loaded)
    return model


def _refuse_random_weights(name: str, loaded: Mapping[str, Any]) -> None:
    """Raise :class:`TargetError` where the checkpoint did not have every tensor of the model, which
    transformers then draws at random, with a warning.
    """
    mismatched = {each if isinstance(each, str) else each[0] for each in loaded["mismatched_keys"]}
    missing = sorted({*loaded["missing_keys"], *mismatched})
    if not missing:
        return
    others = sorted(loaded["unexpected_keys"])
    unknown = f"; it has {_some(others)}, which the model does not know" if others else ""
    raise TargetError(
        f"target {name!r} is not whole: its checkpoint lacks {_some(missing)}{unknown}. They would "
        "be random numbers; is the download complete, and of this architecture?"
    )


def _some(names: Sequence[str], what: str = "tensors") -> str:
    more = f" and {len(names) - 3} more {what}" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _existing(name: str) -> str:
    """Where a model is. Raises :class:`TargetError` for a folder that has none."""
    where = resolve(name)
    if _is_path(where) and not (Path(where) / "config.json").is_file():
        raise TargetError(
            f"there is no model at {where} (a folder with config.json and weights); give one, a "
            "Hugging Face model id, or 'embedded'"
        )
    return where


def _on(place: Any, name: str, model: Any) -> Any:
    try:
        return model.to(place)
    except (RuntimeError, AssertionError) as error:
        raise TargetError(
            f"target {name!r} does not fit on {place}: {_first_line(error)}; lay it on several "
            "GPUs with --device-map auto, or cut it over them with --tp"
        ) from None


def _require_accelerate(option: str) -> None:
    if importlib.util.find_spec("accelerate") is None:
        raise TargetError(
            f"{option} needs accelerate, and there is none here; pip install 'draftmq[worker]'"
        )


def _tensor_parallel() -> dict[str, Any]:
    """What ``from_pretrained`` of this transformers wants to be told, to cut a model by its own
    plan.
    """
    try:
        from transformers.distributed import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    except (ImportError, TypeError):  # before 5.17
        return {"tp_plan": "auto"}


def _refuse_offloaded(name: str, model: Any) -> None:
    """Raise :class:`TargetError` where weights are not on the device that computes with them:
    each forward would wait for them, and some are not there to be shown.
    """
    places: Mapping[str, Any] = getattr(model, "hf_device_map", {})
    devices = {str(place) for place in places.values()}
    away = {"disk", "meta"} | ({"cpu"} if len(devices - {"cpu", "disk", "meta"}) else set())
    parts = [part for part, place in places.items() if str(place) in away]
    if parts:
        raise TargetError(
            f"target {name!r} does not fit on its devices: {_some(parts, 'parts')} would be on "
            f"{', '.join(sorted(devices & away))}; use more or larger GPUs, or a smaller dtype"
        )


def _is_path(where: str) -> bool:
    return where.startswith(("/", ".", "~")) or where.count("/") > 1 or Path(where).exists()


def _device(device: str, torch: Any) -> Any:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise TargetError(f"unknown device {device!r}: {_first_line(error)}") from None
    if place.type == "cuda" and not torch.cuda.is_available():
        raise TargetError(
            f"device {device!r} was asked for, and this torch {torch.__version__} sees no CUDA "
            "device; choose cpu, or install a torch with CUDA"
        )
    return place


def _dtype(dtype: Any, name: str, torch: Any) -> Any:
    if dtype is None:
        return torch.float32 if name == "embedded" else "auto"
    if dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    known = ("float32", "bfloat16", "float16")
    if dtype not in known:
        raise TargetError(f"unknown dtype {dtype!r}; choose {', '.join(known)} or auto")
    return getattr(torch, dtype)


def _tokenizer_of(name: str, where: str) -> str:
    """What a trainer loads as the tokenizer: a name holds on every host."""
    return name if name == "embedded" else _tokenizer(where)


def _tokenizer(where: str) -> str:
    folder = Path(where)
    if not folder.is_dir():
        return where
    there = any((folder / file).is_file() for file in _TOKENIZER_FILES)
    return str(folder.resolve()) if there else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
