"""Checkpoints in the Hugging Face layout: config.json and safetensors, read with every weight accounted for.

Pickled weights are never opened: to unpickle a file is to run what is in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from attsvm.data.hub import quiet_hub, quiet_transformers, reason_of
from attsvm.errors import AttSVMError, InvalidInputError, UnsupportedError
from attsvm.models.checkpoint_names import Family, Weight

__all__ = ["FAMILY_HOMES", "family_of", "from_pretrained", "save_pretrained"]

FAMILY_HOMES = {
    "bert": "attsvm.models.pretrained_text",
    "gpt2": "attsvm.models.pretrained_text",
    "llama": "attsvm.models.pretrained_text",
    "bart": "attsvm.models.pretrained_seq2seq",
    "t5": "attsvm.models.pretrained_seq2seq",
    "vit": "attsvm.models.pretrained_vision",
    "dinov2": "attsvm.models.pretrained_vision",
}
"""The module whose ``FAMILIES`` holds the :class:`~attsvm.models.checkpoint_names.Family` of each model type."""

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SHOWN = 3  # names in a message
_WHERE = "from_pretrained"


def from_pretrained(path: str | Path, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Load a pretrained model.

    Parameters
    ----------
    path
        A folder with ``config.json`` and ``model.safetensors`` (or its shards with their index), a ``.gguf`` file, or
        the id of a model on the Hub (which HF_HUB_OFFLINE=1 restricts to those already downloaded).
    dtype
        Of the parameters; by default that of the file, or float32 where the file has several.

    Returns
    -------
    nn.Module
        An :class:`~attsvm.models.encoder.Encoder`, a :class:`~attsvm.models.decoder.Decoder` or another model of this
        package, in evaluation mode. ``model.config`` has its sizes.

    Raises
    ------
    InvalidInputError
        If there is no such model, a file is damaged, or the weights are not exactly those that the configuration asks
        for: none missing, none too many, all of the right shape.
    UnsupportedError
        If it is of another family, has options that are not implemented, or has pickled weights only.

    Examples
    --------
    >>> import tempfile, torch
    >>> from attsvm.models import Decoder, DecoderConfig
    >>> config = DecoderConfig(d_vocab=10, d_model=8, n_layers=1, n_heads=2, d_mlp=32, n_ctx=16)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_pretrained(Decoder(config), folder)
    ...     from_pretrained(folder).config == config
    True
    """
    place = _locate(path)
    if place.suffix == ".gguf" and place.is_file():
        content, tensors = _read_gguf(place)
    else:
        content, tensors = _read_config(place), _read_tensors(place)
    return _assemble(_family(content), content, tensors, dtype)


def save_pretrained(model: nn.Module, path: str | Path) -> None:
    """Write a model to a folder as ``config.json`` and ``model.safetensors``, which transformers loads too.

    Parameters
    ----------
    model
        A model of this package.
    path
        The folder; made if need be. Files of these names are replaced.

    Raises
    ------
    UnsupportedError
        If no family of checkpoints has a model of this configuration.
    InvalidInputError
        If ``path`` is not a folder.
    """
    family = family_of(model)
    config = model.config
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors = {
        family.full_name(weight.theirs, config): weight.join(own).cpu().contiguous()
        for weight in family.weights(config)
    }
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    content = {**family.write_config(config), "model_type": family.model_type, "dtype": dtype}
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise InvalidInputError(f"save_pretrained: path must be a folder, got the file {folder}.")
    folder.mkdir(parents=True, exist_ok=True)
    # Under other names first: a write that is interrupted leaves no half of a model.
    unfinished = folder / f".{_WEIGHTS}.{os.getpid()}"
    try:
        save_file(tensors, unfinished, metadata={"format": "pt"})
        os.replace(unfinished, folder / _WEIGHTS)
        unfinished.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(unfinished, folder / "config.json")
    finally:
        unfinished.unlink(missing_ok=True)


def family_of(model: nn.Module) -> Family:
    """The family of checkpoints in which a model can be saved.

    Raises
    ------
    UnsupportedError
        If there is none.
    """
    config = getattr(model, "config", None)
    for model_type in FAMILY_HOMES:
        family = _family({"model_type": model_type})
        if config is not None and family.accepts(config):
            return family
    raise UnsupportedError(
        f"save_pretrained: model must be of a configuration that one of {', '.join(FAMILY_HOMES)} has, "
        f"got {type(model).__name__} with {config}."
    )


def _family(content: Mapping[str, Any]) -> Family:
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILY_HOMES:
        raise UnsupportedError(
            f"{_WHERE}: model_type in config.json must be one of {', '.join(FAMILY_HOMES)}, got {model_type!r}."
        )
    family: Family = import_module(FAMILY_HOMES[model_type]).FAMILIES[model_type]
    return family


# ------------------------------------------------------------------------------------------------------------ assembly


def _assemble(
    family: Family, content: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> nn.Module:
    """Build the model and fill in its weights."""
    plain = _plain(family, tensors)
    with _values_of_the_right_kind():
        config = family.read_config(content, frozenset(plain))
    weights = _account(family, config, plain)
    with _values_of_the_right_kind(), torch.random.fork_rng(devices=[]):
        # Forked, as loading leaves no trace in the caller's random numbers.
        model = family.build(config)
    dtypes = {plain[weight.theirs].dtype for weight in weights}
    model.to(dtype or (dtypes.pop() if len(dtypes) == 1 else torch.float32))
    # Only now: a change of dtype puts new tensors in the place of buffers.
    parameters = dict(model.named_parameters())
    own = parameters | dict(model.named_buffers())
    sizes = {name: tensor.shape for name, tensor in own.items()}
    absent = next((name for weight in weights for name in weight.ours if name not in own), None)
    if absent is not None:
        raise InvalidInputError(
            f"{_WHERE}: config.json must give a {family.model_type} model all its parts, got sizes without {absent}."
        )
    filled = set()
    with torch.no_grad():
        for weight in weights:
            for name, tensor in weight.split(plain[weight.theirs], sizes).items():
                own[name].copy_(tensor)
                filled.add(name)
    assert filled >= set(parameters), f"no weight for {sorted(set(parameters) - filled)}"
    return model.eval()


@contextmanager
def _values_of_the_right_kind() -> Iterator[None]:
    """Any error of what is made from config.json, as one of config.json."""
    try:
        yield
    except AttSVMError:
        raise
    except (TypeError, AttributeError, KeyError, ValueError, ArithmeticError, RuntimeError) as error:
        raise InvalidInputError(f"{_WHERE}: config.json must give values of the right kind ({error}).") from error


def _plain(family: Family, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of the family's table."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = family.plain_name(name)
        if short in plain:
            raise InvalidInputError(f"{_WHERE}: weights must have one name each, got {short} twice.")
        if not family.is_unused(short):
            plain[short] = tensor
    return plain


def _account(family: Family, config: Any, plain: Mapping[str, Tensor]) -> list[Weight]:
    """The weights of a configuration, after making sure that they are exactly those that are there."""
    # First of all, so that a damaged configuration cannot ask for a table or a model without end.
    n_layers = getattr(config, "n_layers", 0)
    if n_layers > len(plain):
        raise InvalidInputError(
            f"{_WHERE}: weights must be those of {n_layers} layers, as config.json says, got {len(plain)} tensors."
        )
    weights = list(family.weights(config))
    wanted = {weight.theirs for weight in weights}
    copies = dict(family.copies)
    surplus = [name for name in plain if name not in wanted and not _is_copy(name, copies, plain)]
    for kind, names in (("missing", sorted(wanted - plain.keys())), ("too many", sorted(surplus))):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise InvalidInputError(
                f"{_WHERE}: weights must be exactly those of the {family.model_type} model in config.json, "
                f"got {len(names)} {kind}: {', '.join(names[:_SHOWN])}{more}."
            )
    strange = next((name for name in wanted if not plain[name].is_floating_point()), None)
    if strange is not None:
        raise InvalidInputError(f"{_WHERE}: weights must be floating-point, got {plain[strange].dtype} in {strange}.")
    # Before the model is built: a damaged width could ask for more memory than there is.
    held, asked = sum(plain[name].numel() for name in wanted), getattr(config, "n_parameters", 0)
    if asked > held:
        raise InvalidInputError(
            f"{_WHERE}: weights must have the shapes that config.json gives them, {asked} numbers in all, got {held}. "
            "Hint: config.json and the weights are of two models."
        )
    return weights


def _is_copy(name: str, copies: Mapping[str, str], plain: Mapping[str, Tensor]) -> bool:
    original = plain.get(copies.get(name, ""))
    copy = plain[name]
    return original is not None and original.dtype == copy.dtype and torch.equal(original, copy)


# --------------------------------------------------------------------------------------------------------------- files


def _locate(path: str | Path) -> Path:
    name = str(path)
    if not name:
        raise InvalidInputError(f"{_WHERE}: path must be an existing folder, a .gguf file or a Hub id, got ''.")
    with suppress(OSError, RuntimeError):  # a name too long for the file system; "~nobody"
        place = Path(path).expanduser()
        if place.suffix in _PICKLED:
            raise UnsupportedError(
                f"{_WHERE}: path must be a folder with safetensors weights, got {name}, which is a pickle and is never "
                "opened. Hint: use a revision or a copy of the model with model.safetensors."
            )
        if place.is_dir() or (place.is_file() and place.suffix == ".gguf"):
            return place
        if place.exists():
            raise InvalidInputError(
                f"{_WHERE}: path must be a folder with config.json and safetensors weights, or a .gguf file, got the "
                f"file {name}."
            )
    if isinstance(path, Path) or name.startswith((".", "/", "~", "\\")) or name.count("/") > 1:
        raise InvalidInputError(f"{_WHERE}: path must be an existing folder, a .gguf file or a Hub id, got {name!r}.")
    return _download(name)


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UnsupportedError(
            f"{_WHERE}: path must be an existing folder where transformers is not installed, got {name!r}. "
            "Hint: pip install 'attsvm[hf]'."
        ) from error
    files = ["config.json", "*.safetensors", "*.safetensors.index.json"]
    try:
        with quiet_hub():
            return Path(snapshot_download(name, allow_patterns=files))
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidInputError(
            f"{_WHERE}: path must be a folder or a model that the Hub gives, got {name!r} ({reason_of(error)})."
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise InvalidInputError(f"{_WHERE}: path must be the folder of a model, got {folder} without config.json.")
    content = _read_json(file)
    if content.get("quantization_config"):
        raise UnsupportedError(f"{_WHERE}: weights must not be quantised, got quantization_config in {file}.")
    return content


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInputError(
            f"{_WHERE}: {file.name} must be JSON, got an unreadable one in {file.parent}."
        ) from error
    if not isinstance(content, dict):
        raise InvalidInputError(f"{_WHERE}: {file.name} must hold one object, got {type(content).__name__}.")
    return content


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, from one file or from shards."""
    if (folder / _WEIGHTS).is_file():
        return _read_safetensors(folder / _WEIGHTS)
    if (folder / _INDEX).is_file():
        return _read_shards(folder)
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)
    if pickled:
        raise UnsupportedError(
            f"{_WHERE}: path must hold safetensors weights, got only {pickled[0]} in {folder}, which is a pickle and "
            "is never opened. Hint: use a revision or a copy of the model with model.safetensors."
        )
    raise InvalidInputError(f"{_WHERE}: path must hold {_WEIGHTS}, got {folder} without it.")


def _read_shards(folder: Path) -> dict[str, Tensor]:
    shards = _read_json(folder / _INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise InvalidInputError(f"{_WHERE}: {_INDEX} must hold a weight_map of names to files, got none in {folder}.")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(shards.values())):
        # The index comes with the model; it may not point elsewhere, nor at files of another kind.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InvalidInputError(f"{_WHERE}: {_INDEX} must name .safetensors files of its own folder, got {name!r}.")
        tensors.update(_read_safetensors(folder / name))
    absent = sorted(shards.keys() - tensors.keys())
    if absent:
        raise InvalidInputError(f"{_WHERE}: the shards must hold all weights of {_INDEX}, got none for {absent[0]}.")
    return tensors


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise InvalidInputError(f"{_WHERE}: path must hold all shards of the model, got none named {file.name}.")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise InvalidInputError(
            f"{_WHERE}: {file.name} must be a whole safetensors file, got a damaged or truncated one ({error})."
        ) from error


def _read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of a GGUF file, which transformers unpacks to float32."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise UnsupportedError(
            f"{_WHERE}: path must be a folder with safetensors weights where transformers is not installed, got "
            f"{file.name}. Hint: pip install 'attsvm[hf]' gguf."
        ) from error
    try:
        with quiet_transformers(), torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_pretrained(
                str(file.parent), gguf_file=file.name, dtype=torch.float32, local_files_only=True
            )
    except ImportError as error:
        raise UnsupportedError(f"{_WHERE}: a GGUF file needs the packages gguf and accelerate ({error}).") from error
    except Exception as error:  # the reader raises what it likes where a file is damaged
        raise InvalidInputError(
            f"{_WHERE}: {file.name} must be a whole GGUF file of a known model ({reason_of(error)})."
        ) from error
    content = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    return content, dict(model.state_dict())
