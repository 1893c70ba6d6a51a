"""Pictures as the input of a vision transformer, and as a small image for the page."""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from errno import ENAMETOOLONG, ENOENT
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from attsvm.errors import InvalidInputError, UnsupportedError

if TYPE_CHECKING:
    from attsvm.microscope.loading import Loaded

__all__ = ["Picture", "PictureFormat", "picture_format", "pixel_values", "read_picture"]

MAX_PIXELS = 80_000_000
"""A file that claims more is not decoded."""

_WHERE = "inspect"
_DATA_BYTES = 60_000
_SHOWN_SIDE = 448
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_BICUBIC = 3


@dataclass(frozen=True, kw_only=True)
class PictureFormat:
    """How a model takes pictures. ``height`` and ``width`` are those of its input, ``patch`` those of a patch.

    ``resize`` is the height and width that a picture is brought to before the middle is cut out; None: its shorter
    side gets ``shortest``. ``n_prefix`` tokens (a class token, registers) stand before those of the patches.
    """

    height: int
    width: int
    patch: tuple[int, int]
    n_prefix: int
    n_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: tuple[int, int] | None
    shortest: int
    resample: int
    known: bool

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.height // self.patch[0], self.width // self.patch[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Picture:
    """A picture as the model sees it.

    Attributes
    ----------
    name
        Its file, or a number.
    rows, columns
        Of patches.
    pixels
        (height, width, channels) uint8, after resizing and cutting.
    form
        How the model takes it.
    """

    name: str
    rows: int
    columns: int
    pixels: npt.NDArray[np.uint8]
    form: PictureFormat

    @property
    def height(self) -> int:
        """In pixels."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """In pixels."""
        return int(self.pixels.shape[1])

    def data(self) -> str:
        """The picture as a ``data:`` address of at most 60 kB: PNG where that is small enough, else JPEG."""
        image = _image_of(self.pixels)
        scale = min(1.0, _SHOWN_SIDE / max(self.height, self.width))
        for shrink in (1.0, 0.7, 0.5, 0.35, 0.25, 0.1):
            size = [max(1, round(side * scale * shrink)) for side in (self.width, self.height)]
            small = image.resize((size[0], size[1])) if tuple(size) != image.size else image
            for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 85}), ("jpeg", {"quality": 60})):
                target = io.BytesIO()
                small.save(target, kind, **options)
                address = f"data:image/{kind};base64,{base64.b64encode(target.getvalue()).decode('ascii')}"
                if len(address) <= _DATA_BYTES:
                    return address
        raise AssertionError("45 x 45 pixels take less than 60 kB")

    def record(self) -> dict[str, Any]:
        """What a page needs to draw it."""
        size = {"width": self.width, "height": self.height, "rows": self.rows, "columns": self.columns}
        return {**size, "data": self.data()}

    def tokens(self) -> tuple[list[str], list[bool]]:
        """Names of the tokens and whether they are special: ``CLS``, ``R1``, ..., then the patches, ``r3c5``."""
        prefix = (["CLS"] + [f"R{number}" for number in range(1, self.form.n_prefix)])[: self.form.n_prefix]
        patches = [f"r{row}c{column}" for row in range(1, self.rows + 1) for column in range(1, self.columns + 1)]
        return prefix + patches, [True] * len(prefix) + [False] * len(patches)


def pixel_values(pictures: Sequence[Picture]) -> Tensor:
    """(B, channels, height, width) float32, scaled as the model was trained on."""
    form = pictures[0].form
    stacked = torch.from_numpy(np.stack([picture.pixels for picture in pictures])).float() / 255
    mean, std = torch.tensor(form.mean), torch.tensor(form.std)
    return ((stacked - mean) / std).permute(0, 3, 1, 2).contiguous()


# --------------------------------------------------------------------------------------------------------------- format


def picture_format(loaded: Loaded, *, max_tokens: int | None = None) -> PictureFormat:
    """How a model takes pictures, from its processor, its configuration, and how many tokens it makes of one.

    Parameters
    ----------
    loaded
        The model.
    max_tokens
        At most so many tokens, for models that take pictures of any size.

    Raises
    ------
    UnsupportedError
        If its tokens are not the patches of one regular grid.
    InvalidInputError
        If ``max_tokens`` is less than the model makes, or its processor has values of the wrong kind.
    """
    config = loaded.model.config
    patch, image = _pair(getattr(config, "patch_size", None)), _pair(getattr(config, "image_size", None))
    if patch is None:
        raise UnsupportedError(
            f"{_WHERE}: model must cut pictures into patches, got {loaded.family} without patch_size."
        )
    processor = _Processor(loaded.processor)
    size, resize, shortest = processor.size(image or (224, 224))
    n_channels = int(getattr(config, "num_channels", 3))
    if image is not None and size != image and not _any_size(loaded):
        size, resize = image, image
    if max_tokens is not None and _any_size(loaded):
        most = max(1, math.isqrt(max(max_tokens - 8, 1)))
        if size[0] // patch[0] > most or size[1] // patch[1] > most:
            size = (min(size[0], most * patch[0]), min(size[1], most * patch[1]))
            resize, shortest = None, min(size)
    size = (size[0] // patch[0] * patch[0], size[1] // patch[1] * patch[1])
    if min(size) == 0:
        raise InvalidInputError(f"{_WHERE}: pictures must hold a patch of {patch[0]} x {patch[1]} pixels, got none.")
    mean, std = processor.scaling(n_channels, _IMAGENET if "dino" in loaded.family else _HALF)
    form = PictureFormat(
        height=size[0],
        width=size[1],
        patch=patch,
        n_prefix=_n_prefix(loaded, size, patch, n_channels),
        n_channels=n_channels,
        mean=mean,
        std=std,
        resize=resize,
        shortest=max(shortest, *size) if resize is None else shortest,
        resample=processor.resample,
        known=processor.known,
    )
    n_tokens = form.n_prefix + form.grid[0] * form.grid[1]
    if max_tokens is not None and n_tokens > max_tokens:
        raise InvalidInputError(
            f"{_WHERE}: max_tokens must be at least {n_tokens}, the tokens of one picture, got {max_tokens}."
        )
    return form


def _any_size(loaded: Loaded) -> bool:
    """Whether the model fits its positions to the size of the picture."""
    return loaded.family.startswith("dino") and not loaded.takes("interpolate_pos_encoding")


def _n_prefix(loaded: Loaded, size: tuple[int, int], patch: tuple[int, int], n_channels: int) -> int:
    """Tokens before those of the patches, by trial."""
    model = loaded.model
    weight = next(model.parameters())
    grid = size[0] // patch[0] * (size[1] // patch[1])
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.inference_mode():
            output = model(
                pixel_values=torch.zeros(1, n_channels, *size, device=weight.device, dtype=weight.dtype),
                output_hidden_states=True,
            )
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UnsupportedError(f"{_WHERE}: model must take a picture, got one that fails ({error}).") from error
    finally:
        for module, was in training:
            module.training = was
    states = getattr(output, "hidden_states", None)
    shape = tuple(states[0].shape) if states else tuple(output[0].shape)
    n_tokens = shape[1] if len(shape) == 3 else 0
    if (states and len({tuple(state.shape) for state in states}) > 1) or not grid <= n_tokens <= grid + 64:
        raise UnsupportedError(
            f"{_WHERE}: model must have a token for each of {grid} patches in all layers, got {loaded.family}, which "
            "has not."
        )
    return n_tokens - grid


class _Processor:
    """The numbers of an image processor, whether an object or the content of its file."""

    def __init__(self, given: Any) -> None:
        self._given = given
        self.known = given is not None
        resample = self._get("resample")
        self.resample = int(resample) if isinstance(resample, int) else _BICUBIC

    def _get(self, name: str) -> Any:
        if isinstance(self._given, Mapping):
            return self._given.get(name)
        return getattr(self._given, name, None)

    def size(self, default: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int] | None, int]:
        """(height, width) of the input, (height, width) to resize to, or the shorter side."""
        asked, cropped = self._get("size"), _pair(self._get("crop_size"))
        whole = _pair(asked)
        if self._get("do_center_crop") is False or cropped is None:
            if whole is None:
                side = _side(asked)
                whole = (side, side) if side else default
            return whole, whole, min(whole)
        return cropped, whole, _side(asked) or min(cropped)

    def scaling(
        self, n_channels: int, default: tuple[tuple[float, ...], tuple[float, ...]]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel."""
        if self._get("do_normalize") is False:
            return (0.0,) * n_channels, (1.0,) * n_channels
        result = []
        for name, values in (("image_mean", default[0]), ("image_std", default[1])):
            asked = self._get(name)
            numbers = values if asked is None else tuple(asked) if isinstance(asked, list | tuple) else (asked,)
            if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
                raise InvalidInputError(f"{_WHERE}: {name} of the processor must hold numbers, got {asked!r}.")
            result.append(tuple((float(numbers[at % len(numbers)])) for at in range(n_channels)))
        if 0.0 in result[1]:
            raise InvalidInputError(f"{_WHERE}: image_std of the processor must not be 0, got {result[1]}.")
        return result[0], result[1]


def _pair(value: Any) -> tuple[int, int] | None:
    """(height, width) of a number, a pair, or a mapping with both; else None."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(side, int) for side in value):
        return value[0], value[1]
    both = [_field(value, name) for name in ("height", "width")]
    return (both[0], both[1]) if all(isinstance(side, int) for side in both) else None


def _side(value: Any) -> int:
    side = _field(value, "shortest_edge")
    return side if isinstance(side, int) else 0


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


# ---------------------------------------------------------------------------------------------------------------- files


def read_picture(source: Any, form: PictureFormat, *, name: str) -> Picture:
    """A picture in a model's size.

    Parameters
    ----------
    source
        A file, an image of PIL, or an array: (height, width), or (height, width, channels) with 1, 3 or 4 channels;
        uint8, or numbers in [0, 1].
    form
        How the model takes it.
    name
        For people and messages.

    Raises
    ------
    InvalidInputError
        If it is no such picture.
    UnsupportedError
        If Pillow is not installed.
    """
    image = _opened(source, name)
    if min(image.size) < 1:
        raise InvalidInputError(f"{_WHERE}: pictures must have pixels, got {name} without any.")
    image = image.convert("L" if form.n_channels == 1 else "RGB")
    width, height = image.size
    if form.resize is not None:
        target = form.resize
    else:
        factor = form.shortest / min(width, height)
        target = (max(form.height, int(height * factor)), max(form.width, int(width * factor)))
    if max(target) > 50 * min(target):
        raise InvalidInputError(f"{_WHERE}: pictures must not be narrower than 1:50, got {name}, {width} x {height}.")
    image = image.resize((target[1], target[0]), form.resample)
    top, left = (target[0] - form.height) // 2, (target[1] - form.width) // 2
    image = image.crop((left, top, left + form.width, top + form.height))
    pixels = np.asarray(image, dtype=np.uint8).reshape(form.height, form.width, form.n_channels)
    rows, columns = form.grid
    return Picture(name=name, rows=rows, columns=columns, pixels=pixels, form=form)


def _opened(source: Any, name: str) -> Any:
    pil = _pil()
    if isinstance(source, pil.Image):
        return source
    if not isinstance(source, str | Path):
        return _image_of(_array(source, name))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes that are refused below
            with pil.open(source, formats=_FORMATS) as image:
                if image.width * image.height <= MAX_PIXELS:
                    return _upright(image)
                size = f"{image.width} x {image.height}"
        raise InvalidInputError(f"{_WHERE}: pictures must have at most {MAX_PIXELS} pixels, got {name}, {size}.")
    except InvalidInputError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise whatever it met
        if isinstance(source, str) and isinstance(error, OSError) and error.errno in (ENOENT, ENAMETOOLONG):
            # Most likely a sentence: without DATA there are those of the sample.
            shown = source if len(source) <= 60 else f"{source[:60]}..."
            raise InvalidInputError(
                f"{_WHERE}: DATA must be pictures for this model; {shown} must be a picture (PNG, JPEG, ...), "
                "got no file of that name."
            ) from error
        raise InvalidInputError(f"{_WHERE}: {name} must be a picture (PNG, JPEG, ...), got {error}.") from error


def _upright(image: Any) -> Any:
    """The picture as its camera was held; 16 bits of grey as 8."""
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = _image_of((np.asarray(image) >> 8).astype(np.uint8))
    return image


def _array(values: Any, name: str) -> npt.NDArray[np.uint8]:
    try:
        array = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values)
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{_WHERE}: pictures must be files or arrays, got {name} ({error}).") from error
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if not fits or not array.size:
        raise InvalidInputError(
            f"{_WHERE}: pictures must be (height, width) or (height, width, channels), got {name} of {array.shape}."
        )
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind not in "bfiu":
        raise InvalidInputError(f"{_WHERE}: pictures must hold numbers, got {name} of {array.dtype}.")
    numbers = array.astype(np.float64)
    if not (np.isfinite(numbers).all() and numbers.min() >= 0 and numbers.max() <= 1):
        raise InvalidInputError(f"{_WHERE}: pictures must be uint8 or hold numbers in [0, 1], got {name} beyond them.")
    return np.rint(numbers * 255).astype(np.uint8)


def _image_of(pixels: npt.NDArray[np.uint8]) -> Any:
    flat = pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    return _pil().fromarray(np.ascontiguousarray(flat))


def _pil() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise UnsupportedError(
            f"{_WHERE}: Pillow must be installed to read pictures, and it is not. Hint: pip install pillow."
        ) from error
    return Image
