"""``attsvm doctor``: what is installed here, and what can be inspected in a model."""

from __future__ import annotations

import json
import os
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from attsvm.cli.terminal import say
from attsvm.data.cache import default_cache_dir
from attsvm.errors import InvalidInputError
from attsvm.records import package_versions, source_commit

__all__ = ["doctor_command"]

_PACKAGES = ("torch", "numpy", "numba", "safetensors", "transformers", "tokenizers")
_DEVELOPMENT = ("docs", "dev")


def doctor_command(
    model: Annotated[
        str | None,
        typer.Argument(help="A Hugging Face model: a folder, a .gguf file, or an id.", show_default=False),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or id of the tokenizer. Default: the model's.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Texts that would run at once.")] = 16,
    max_tokens: Annotated[int, typer.Option(help="Tokens of the longest text.")] = 512,
    device: Annotated[str, typer.Option(help="Device of the model.")] = "cpu",
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16", "float64"], typer.Option(help="Number format of the model.")
    ] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing: the exit code says it.")] = False,
) -> None:
    """See versions, devices, memory and missing extras; with MODEL, what can be inspected in it and what cannot.

    Exit code 0: all is well, 2: MODEL or an option cannot be used, 3: nothing in MODEL can be inspected.
    """
    for name, value in (("--batch-size", batch_size), ("--max-tokens", max_tokens)):
        if value < 1:
            raise InvalidInputError(f"doctor: {name} must be at least 1, got {value}.")
    found = _machine()
    if model is not None:
        if not quiet and not as_json:
            say(f"Looking at {model} ...")
        found["model"] = _model(model, tokenizer, batch_size, max_tokens, device, dtype)
    if as_json:
        print(json.dumps(found))
    elif not quiet:
        print(_told(found))


# ---------------------------------------------------------------------------------------------------------- the machine


def _machine() -> dict[str, Any]:
    import torch

    total, free = _memory()
    return {
        "versions": package_versions(*_PACKAGES),
        "commit": source_commit(),
        "platform": platform.platform(),
        "cpu": {
            "count": os.cpu_count(),
            "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "memory": {"total": total, "available": free},
        "cuda": _cuda(),
        "cache": _cache(),
        "extras": _extras(),
    }


def _memory() -> tuple[int | None, int | None]:
    """Bytes of memory, and of those that are free, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        return sizes.get("MemTotal"), sizes.get("MemAvailable")
    except (OSError, ValueError, IndexError):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
        except (OSError, ValueError, AttributeError):
            return None, None


def _cuda() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": device.name, "memory": device.total_memory} for device in devices]


def _cache() -> dict[str, Any]:
    folder = default_cache_dir()
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.lstat(os.path.join(place, name)).st_size
            except OSError:  # another process removed it
                continue
    return {"folder": str(folder), "exists": folder.is_dir(), "bytes": size}


def _extras() -> list[dict[str, Any]]:
    """The optional extras that the package declares, with what is missing or too old."""
    needed: dict[str, list[str]] = {}
    for line in metadata.requires("attsvm") or []:
        requirement, _, condition = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w.-]+)['\"]", condition)
        if extra and extra[1] not in _DEVELOPMENT:
            needed.setdefault(extra[1], []).append(requirement.strip())
    return [_extra(name, needed) for name in needed]


def _extra(name: str, needed: dict[str, list[str]]) -> dict[str, Any]:
    own: list[str] = []
    for requirement in needed[name]:
        inner = re.match(r"attsvm\[([\w.-]+)\]", requirement)
        own += needed.get(inner[1], []) if inner else [requirement]
    missing = [problem for requirement in own if (problem := _problem(requirement))]
    return {"name": name, "present": not missing, "missing": missing, "command": f"pip install 'attsvm[{name}]'"}


def _problem(requirement: str) -> str | None:
    """What is wrong with one required package: absent, or older than the oldest that will do."""
    found = re.match(r"([\w.-]+)(?:\[[^\]]*\])?\s*(?:.*?>=\s*([\d.]+))?", requirement)
    if not found:
        return None
    try:
        version = metadata.version(found[1])
    except metadata.PackageNotFoundError:
        return found[1]
    if found[2] and _numbers(version) < _numbers(found[2]):
        return f"{found[1]} {version} is older than {found[2]}"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


# ------------------------------------------------------------------------------------------------------------ the model


def _model(
    model: str, tokenizer: str | None, batch_size: int, max_tokens: int, device: str, dtype: str
) -> dict[str, Any]:
    """What can be inspected in a model; raises UnsupportedError where nothing can."""
    from attsvm.microscope.capture import working_inputs
    from attsvm.microscope.check import check_against_eager
    from attsvm.microscope.families import describe
    from attsvm.microscope.live import speaking_as
    from attsvm.microscope.loading import load

    with speaking_as("doctor"):
        loaded = load(model, tokenizer, device=device, dtype=dtype)
    about = describe(loaded.model)
    check = check_against_eager(loaded.model, working_inputs(loaded.model))
    n_ctx = _picture_tokens(loaded.model) if loaded.sees_pictures else loaded.n_ctx
    taken = max_tokens if n_ctx is None else n_ctx if loaded.sees_pictures else min(max_tokens, n_ctx)
    needed = about.memory_bytes(batch_size, taken)
    free = _memory()[1]
    return {
        "name": loaded.name,
        "family": about.family,
        "n_parameters": about.n_parameters,
        "parameter_bytes": about.parameter_bytes,
        "n_heads": about.n_heads,
        "n_ctx": n_ctx,
        "tier": about.tier,
        "reads": "pictures" if loaded.sees_pictures else "texts",
        "tokenizer": None if loaded.tokenizer is None else type(loaded.tokenizer).__name__,
        "modules": [
            {
                **{
                    name: getattr(one.info, name)
                    for name in ("name", "kind", "layer", "n_heads", "n_kv_heads", "d_head")
                },
                "spaces": list(one.spaces),
                "residual": one.residual,
                "terms": list(one.terms),
            }
            for one in about.modules
        ],
        "notes": list(about.notes),
        "check": vars(check),
        "memory": {
            "batch_size": batch_size,
            "max_tokens": taken,
            "bytes": needed,
            "fits": None if free is None or loaded.device.type != "cpu" else needed - about.parameter_bytes < free,
        },
    }


def _picture_tokens(model: Any) -> int:
    """Patches of a picture, with what the model adds to them."""
    import torch

    from attsvm.microscope.capture import captured, working_inputs
    from attsvm.microscope.listening import evaluating

    lengths: list[int] = []
    with torch.no_grad(), evaluating(model), captured(model, lambda call: lengths.append(call.query_length)):
        model(**working_inputs(model))
    return max(lengths)


# ----------------------------------------------------------------------------------------------------------- for people


def _told(found: dict[str, Any]) -> str:
    cpu, memory, cache = found["cpu"], found["memory"], found["cache"]
    lines = [f"{name:<14}{version}" for name, version in found["versions"].items()]
    if found["commit"]:
        lines.append(f"{'commit':<14}{found['commit'][:12]}")
    devices = [f"{device['name']}, {_size(device['memory'])}" for device in found["cuda"]] or ["none"]
    lines += [
        "",
        f"{'platform':<14}{found['platform']}",
        f"{'processors':<14}{cpu['usable']} of {cpu['count']}, {cpu['torch_threads']} threads of torch",
        f"{'memory':<14}{_size(memory['total'])}, {_size(memory['available'])} free",
        *(f"{'CUDA' if at == 0 else '':<14}{device}" for at, device in enumerate(devices)),
        f"{'cache':<14}{cache['folder']}, {_size(cache['bytes']) if cache['exists'] else 'empty'}",
        "",
    ]
    for extra in found["extras"]:
        said = "present" if extra["present"] else f"absent ({', '.join(extra['missing'])}): {extra['command']}"
        lines.append(f"{'extra ' + extra['name']:<18}{said}")
    if "model" in found:
        lines += ["", *_told_model(found["model"])]
    return "\n".join(lines)


def _told_model(model: dict[str, Any]) -> list[str]:
    memory, check = model["memory"], model["check"]
    reader = {"interface": "transformers' attention interface", "hooks": "hooks"}[model["tier"]]
    context = "without a limit" if model["n_ctx"] is None else f"of up to {model['n_ctx']} tokens"
    lines = [
        f"{model['name']} ({model['family']}): {model['n_heads']} heads in {len(model['modules'])} attention modules",
        f"  {model['n_parameters']:,} parameters, {_size(model['parameter_bytes'])}; reads {model['reads']} {context}",
        f"  read by {reader}; {check['note'][:1].lower()}{check['note'][1:]}",
    ]
    if model["reads"] == "texts" and model["tokenizer"] is None:
        lines.append("  comes without a tokenizer: give one with --tokenizer")
    lines += [f"  {row}" for row in _groups(model["modules"])]
    reasons = sorted({one["residual"] for one in model["modules"] if one["residual"]})
    lines += [f"  no residual space: {reason}" for reason in reasons]
    lines += [f"  {note}" for note in model["notes"] if not any(reason in note for reason in reasons)]
    wanted = f"{memory['batch_size']} {model['reads']} of {memory['max_tokens']} tokens"
    more = ", more than is free" if memory["fits"] is False else ""
    lines.append(f"  memory for {wanted}: about {_size(memory['bytes'])}{more}")
    return lines


def _groups(modules: list[dict[str, Any]]) -> list[str]:
    """Modules that are alike, a line for all of them."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for one in modules:
        alike = (one["kind"], one["n_heads"], one["n_kv_heads"], one["d_head"], *one["spaces"], "|", *one["terms"])
        groups.setdefault(alike, []).append(one["layer"])
    rows = []
    for (kind, n_heads, n_kv_heads, d_head, *rest), layers in groups.items():
        spaces, terms = rest[: rest.index("|")], rest[rest.index("|") + 1 :]
        shared = f", {n_kv_heads} for keys" if n_kv_heads != n_heads else ""
        extra = f"; logits with {', '.join(terms)}" if terms else ""
        rows.append(
            f"{kind} layers {_ranges(layers)}: {n_heads} heads{shared} of {d_head}; {' and '.join(spaces)} space{extra}"
        )
    return rows


def _ranges(numbers: list[int]) -> str:
    """``0-3, 5``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _size(count: int | None) -> str:
    if count is None:
        return "unknown"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
