"""A model of transformers and its tokenizer, from objects, a folder, a .gguf file or the Hub."""

from __future__ import annotations

import inspect
import io
import json
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attsvm.data.hub import DTYPES, check_options, locate, quiet_transformers, reason_of, reserved_positions
from attsvm.data.model_files import check_model_folder
from attsvm.errors import InvalidInputError, UnsupportedError

__all__ = ["Loaded", "load"]

_WHERE = "inspect"
_TOKENIZER_FILES = ("tokenizer*.json", "vocab*", "merges.txt", "spiece.model", "sentencepiece*.model", "*.tiktoken")
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id")
_UNLIMITED = 10**9  # tokenizers write "no limit" as a number beyond it
_SPARE_ROWS = 1024  # embeddings that no token uses, to round their number up


@dataclass(frozen=True, kw_only=True, eq=False)
class Loaded:
    """A model with what turns texts or pictures into its input.

    Attributes
    ----------
    model
        A model of transformers.
    tokenizer
        Its tokenizer, or None where there is none.
    name
        For people: the path or id, or the class of a model that was given as an object.
    family
        ``model_type`` of its configuration, such as ``"bert"``.
    processor
        Of pictures: an image processor or the content of ``preprocessor_config.json``; None where there is none.
    """

    model: nn.Module
    tokenizer: Any | None
    name: str
    family: str
    processor: Any | None = None

    @property
    def sees_pictures(self) -> bool:
        """Whether the input is pixels."""
        return getattr(self.model, "main_input_name", "") == "pixel_values"

    @property
    def has_target(self) -> bool:
        """Whether there is a second text: the model is an encoder-decoder."""
        return bool(getattr(_config(self.model), "is_encoder_decoder", False)) and not self.sees_pictures

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return next(self.model.parameters()).device

    @property
    def d_vocab(self) -> int:
        """Rows of the input embeddings; 0 where there are none."""
        try:
            embeddings = self.model.get_input_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            return 0
        weight = getattr(embeddings, "weight", None)
        return int(weight.shape[0]) if isinstance(weight, torch.Tensor) and weight.ndim == 2 else 0

    @property
    def n_ctx(self) -> int | None:
        """Tokens of a text that the model takes, special ones included; None without a limit."""
        text = _text_config(self.model)
        limits = [int(getattr(self.tokenizer, "model_max_length", _UNLIMITED + 1))]
        for name in ("max_position_embeddings", "max_source_positions"):
            positions = getattr(text, name, None)
            if isinstance(positions, int) and positions > 0:
                limits.append(positions - self.first_position)
        taken = min(limits)
        return None if taken > _UNLIMITED else taken

    @property
    def first_position(self) -> int:
        """Position of the first token: RoBERTa and its kin begin behind the position of padding."""
        return reserved_positions(self.model)

    def takes(self, name: str) -> bool:
        """Whether the model's ``forward`` has an argument of this name."""
        return name in inspect.signature(self.model.forward).parameters


def load(
    model: Any,
    tokenizer: Any | None = None,
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
) -> Loaded:
    """Load a model and its tokenizer.

    Parameters
    ----------
    model
        A model of transformers, which is used as it is; or a folder or a ``.gguf`` file, with which nothing goes over
        the network; or the id of a model on the Hub, which HF_HUB_OFFLINE=1 restricts to those already downloaded.
    tokenizer
        A tokenizer (for models that see pictures: an image processor), its folder, ``.gguf`` file or id; by default
        that of ``model``.
    device
        Where the model runs; by default ``cpu``, or where a model given as an object is.
    dtype
        Type of its numbers: ``float32``, ``float64``, ``bfloat16`` or ``float16``; by default float32, or that of the
        object.

    Returns
    -------
    Loaded
        A model loaded here is in evaluation mode; an object is not touched.

    Raises
    ------
    InvalidInputError
        If the model is not there, has NaN or infinite weights, or the tokenizer is that of another model.
    UnsupportedError
        If transformers is not installed, the weights are pickled, the model has code of its own or reads neither texts
        nor pictures.
    """
    asked = dtype if dtype is None or isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    check_options(batch_size=1, device=device or "cpu", dtype=asked or "float32", where=_WHERE)
    kind: torch.dtype | None = DTYPES[asked] if asked else None
    if isinstance(model, nn.Module):
        module, place, name = _given(model, device, kind), None, _name_of(model)
    else:
        if not isinstance(model, str | Path):
            raise InvalidInputError(
                f"{_WHERE}: model must be a model of transformers, a path or an id, got {type(model).__name__}."
            )
        place, name = locate(model, where=_WHERE)
        module = _load_model(place, kind or torch.float32).to(device or "cpu")
    family = str(_config(module).model_type)
    _check_input(module)
    _check_weights(module)
    loaded = Loaded(model=module, tokenizer=None, name=name, family=family)
    if loaded.sees_pictures:
        return Loaded(model=module, tokenizer=None, name=name, family=family, processor=_processor(tokenizer, place))
    loaded = Loaded(model=module, tokenizer=_tokenizer(tokenizer, place), name=name, family=family)
    _check_tokenizer(loaded)
    return loaded


# --------------------------------------------------------------------------------------------------------------- model


def _given(model: nn.Module, device: str | None, dtype: torch.dtype | None) -> nn.Module:
    """The object itself, after making sure that it is a model of transformers where it is asked to be."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    config = getattr(model, "config", None)
    if not isinstance(getattr(config, "model_type", None), str) or not hasattr(model, "main_input_name"):
        raise UnsupportedError(f"{_WHERE}: model must be a model of transformers, got {type(model).__name__}.")
    weight = next(model.parameters(), None)
    if weight is None:
        raise InvalidInputError(f"{_WHERE}: model must have weights, got {type(model).__name__} without any.")
    if device is not None and torch.device(device).type != weight.device.type:
        raise InvalidInputError(
            f"{_WHERE}: device must be that of the model, {weight.device}, got {device!r}. Hint: move the model."
        )
    if dtype is not None and dtype != weight.dtype:
        raise InvalidInputError(
            f"{_WHERE}: dtype must be that of the model, {weight.dtype}, got {dtype}. Hint: convert the model."
        )
    return model


def _name_of(model: nn.Module) -> str:
    stored = getattr(getattr(model, "config", None), "_name_or_path", None)
    return str(stored) if stored else type(model).__name__


def _load_model(place: Path, dtype: torch.dtype) -> nn.Module:
    """A model from files of this machine, in evaluation mode."""
    gguf = place.is_file() and place.suffix == ".gguf"
    if not gguf:
        check_model_folder(place, where=_WHERE)
    with quiet_transformers(_WHERE), torch.random.fork_rng(devices=[]):
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

        given: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "dtype": dtype}
        if gguf:
            with redirect_stderr(io.StringIO()):  # a progress bar that cannot be switched off
                return _whole(place, AutoModelForCausalLM, str(place.parent), gguf_file=place.name, **given)
        given["use_safetensors"] = True
        config = _attempt(place, AutoConfig, str(place), local_files_only=True, trust_remote_code=False)
        if getattr(config, "is_encoder_decoder", False) and type(config) in AutoModelForSeq2SeqLM._model_mapping:
            # With its head it can write the target; a checkpoint without one is still a model.
            with suppress(InvalidInputError):
                return _whole(place, AutoModelForSeq2SeqLM, str(place), **given)
        plain = AutoModel if type(config) in AutoModel._model_mapping else AutoModelForCausalLM
        return _whole(place, plain, str(place), **given)


def _whole(place: Path, auto: Any, source: str, **given: Any) -> nn.Module:
    """A model of which no weight is missing."""
    model, told = _attempt(place, auto, source, output_loading_info=True, **given)
    # A pooler stands behind the last layer, and a bias of logits behind the head; many checkpoints leave them out.
    missing = sorted(key for key in told["missing_keys"] if "pooler" not in key and "logits_bias" not in key)
    if missing:
        raise InvalidInputError(
            f"{_WHERE}: model must have all its weights, got {place} without {len(missing)}, such as {missing[0]}."
        )
    module: nn.Module = model.eval()
    return module


def _attempt(place: Path, auto: Any, source: str, **given: Any) -> Any:
    try:
        return auto.from_pretrained(source, **given)
    except ImportError as error:
        raise UnsupportedError(
            f"{_WHERE}: {place.name} needs a package that is missing ({reason_of(error)})."
        ) from error
    except Exception as error:  # whatever a damaged file or a foreign architecture makes transformers raise
        raise InvalidInputError(
            f"{_WHERE}: model must be one that transformers loads, got {place} ({reason_of(error)})."
        ) from error


def _check_input(model: nn.Module) -> None:
    main = getattr(model, "main_input_name", "")
    if main not in ("input_ids", "pixel_values"):
        raise UnsupportedError(f"{_WHERE}: model must read texts or pictures, got one of {main}.")
    arguments = inspect.signature(model.forward).parameters
    if {"input_ids", "pixel_values", "return_loss"} <= arguments.keys():
        raise UnsupportedError(
            f"{_WHERE}: model must read texts or pictures, got {type(model).__name__}, which compares the two. "
            "Hint: give its text_model or its vision_model."
        )


def _check_weights(model: nn.Module) -> None:
    for name, weight in model.named_parameters():
        if weight.device.type == "meta":
            raise UnsupportedError(f"{_WHERE}: model must have its weights in memory, got {name} without them.")
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise InvalidInputError(f"{_WHERE}: model must have finite weights, got NaN or infinity in {name}.")


def _config(model: nn.Module) -> Any:
    return model.config


def _text_config(model: nn.Module) -> Any:
    """Of models with several parts, the configuration of the one that reads texts."""
    config = _config(model)
    read = getattr(config, "get_text_config", None)
    return read() if read is not None and not getattr(config, "is_encoder_decoder", False) else config


# ------------------------------------------------------------------------------------------------ tokenizer, processor


def _tokenizer(given: Any, place: Path | None) -> Any | None:
    """What was given, or the tokenizer beside the weights; None where there is neither."""
    if given is not None and not isinstance(given, str | Path):
        if not callable(given) or not hasattr(given, "convert_ids_to_tokens"):
            raise InvalidInputError(
                f"{_WHERE}: tokenizer must be one of transformers, a path or an id, got {type(given).__name__}."
            )
        return given
    if given is not None:
        place = locate(given, where=_WHERE)[0]
    elif place is None or (place.is_dir() and not any(any(place.glob(name)) for name in _TOKENIZER_FILES)):
        return None
    assert place is not None
    files: dict[str, Any] = {}
    source = place
    if place.suffix == ".gguf":
        source, files = place.parent, {"gguf_file": place.name}
    with quiet_transformers(_WHERE):
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(source), local_files_only=True, trust_remote_code=False, **files)
        except Exception as error:  # tokenizers raises bare Exception for a file it cannot parse
            raise InvalidInputError(
                f"{_WHERE}: tokenizer must be one that transformers loads, got {place} ({reason_of(error)})."
            ) from error


def _processor(given: Any, place: Path | None) -> Any | None:
    if given is not None and not isinstance(given, str | Path):
        return given
    folder = locate(given, where=_WHERE)[0] if given is not None else place
    if folder is None or not (folder / "preprocessor_config.json").is_file():
        return None
    try:
        content = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInputError(f"{_WHERE}: preprocessor_config.json must be JSON, got {reason_of(error)}.") from error
    if not isinstance(content, dict):
        raise InvalidInputError(
            f"{_WHERE}: preprocessor_config.json must hold one object, got {type(content).__name__}."
        )
    return content


def _check_tokenizer(loaded: Loaded) -> None:
    """Make sure that the tokenizer can be the model's, as far as the two tell."""
    tokenizer, rows = loaded.tokenizer, loaded.d_vocab
    if tokenizer is None or not rows:
        return
    # Without tokens that were added later: often one for padding, which the model never sees.
    size = int(tokenizer.vocab_size)
    if size > rows:
        raise InvalidInputError(
            f"{_WHERE}: tokenizer must be the model's, with at most {rows} tokens, got one with {size}."
        )
    config = _text_config(loaded.model)
    defaults = _defaults(config)
    pairs = {name: (getattr(config, name, None), getattr(tokenizer, name, None)) for name in _SPECIAL}
    told = {name: (mine, its) for name, (mine, its) in pairs.items() if isinstance(mine, int) and its is not None}
    if any(mine == its for mine, its in told.values()):
        return
    # A number that a configuration was not given says nothing of the tokenizer.
    against = {name: pair for name, pair in told.items() if 0 <= pair[0] < rows and pair[0] != defaults.get(name)}
    if len(against) >= 2 or (told and rows - size > max(_SPARE_ROWS, rows // 10)):
        name, (mine, its) = next(iter((against or told).items()))
        raise InvalidInputError(
            f"{_WHERE}: tokenizer must be the model's, with {rows} tokens and {name} {mine}, got one with {size} "
            f"tokens and {name} {its}."
        )


def _defaults(config: Any) -> dict[str, Any]:
    try:
        plain = type(config)()
    except Exception:  # configurations of several parts cannot be made from nothing
        return {}
    return {name: getattr(plain, name, None) for name in _SPECIAL}
