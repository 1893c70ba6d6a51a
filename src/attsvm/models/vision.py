r"""Vision transformers: an image is cut into patches, and each patch is a token.

A patch of p x p pixels and C channels becomes a token by one linear map (a convolution of stride p). A learned token,
CLS, is put in front, learned positions are added, and pre-norm blocks follow:

$$x \leftarrow x + \lambda_1 \odot \mathrm{Attention}(\mathrm{norm}(x)), \qquad
  x \leftarrow x + \lambda_2 \odot \mathrm{MLP}(\mathrm{norm}(x)).$$

ViT has $\lambda = 1$; DINOv2 learns them (layer scale).

Shapes: B images, C channels, Y and X pixels, N patches, T = N + 1 tokens (CLS first), H heads.

References
----------
Dosovitskiy et al. "An Image is Worth 16x16 Words", 2020. arXiv:2010.11929.
Oquab et al. "DINOv2: Learning Robust Visual Features without Supervision", 2023. arXiv:2304.07193.
Touvron et al. "Going deeper with Image Transformers" (layer scale), 2021. arXiv:2103.17239.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from attsvm.errors import InvalidInputError
from attsvm.models.blocks import Block, BlockConfig
from attsvm.models.checks import check_kinds
from attsvm.models.counts import block_flops, block_parameters, count_parameters
from attsvm.models.output import ModelOutput

__all__ = ["Vision", "VisionConfig"]


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Sizes and kinds of a vision transformer.

    Parameters
    ----------
    image_size, patch_size
        Pixels: one number for squares, or (height, width). Patches must fill the image.
    d_model, n_heads, n_layers, d_mlp
        Width, heads, blocks, and width of the MLP.
    n_channels
        Colours of a pixel.
    activation
        Kind of the MLP, as in :class:`attsvm.models.blocks.MLP`.
    qkv_bias
        Whether queries, keys and values have a bias.
    norm_eps
        Added to the variance in layer norm.
    layer_scale
        Start value of the learned factors per channel of both branches of a block (DINOv2); None: no such factors.
    mask_token
        Whether there is a learned token for hidden patches.
    d_pooled
        Width of the pooled output tanh(linear(CLS)); None: no pooler, and the pooled output is CLS.
    n_classes
        Classes of a linear head; None: no head.
    head_input
        What the head sees: "cls" (ViT), or "cls_mean", CLS and the mean of the patches side by side (DINOv2).
    dropout, attention_dropout
        Shares set to 0 in training: of embeddings and of what each part adds; of the attention weights.
    backend
        See :func:`attsvm.attention.functional.attend`.

    Raises
    ------
    InvalidInputError
        If a size is out of its range, or patches do not fill the image.
    """

    image_size: int | tuple[int, int]
    patch_size: int | tuple[int, int]
    d_model: int
    n_heads: int
    n_layers: int
    d_mlp: int
    n_channels: int = 3
    activation: str = "gelu"
    qkv_bias: bool = True
    norm_eps: float = 1e-6
    layer_scale: float | None = None
    mask_token: bool = False
    d_pooled: int | None = None
    n_classes: int | None = None
    head_input: Literal["cls", "cls_mean"] = "cls"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in ("d_model", "n_heads", "n_layers", "d_mlp", "n_channels", "d_pooled", "n_classes"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise InvalidInputError(f"VisionConfig: {name} must be at least 1, got {size}.")
        if min(*self.image_shape, *self.patch_shape) < 1:
            raise InvalidInputError(
                f"VisionConfig: image_size and patch_size must be at least 1, got {self.image_size} "
                f"and {self.patch_size}."
            )
        if self.d_model % self.n_heads:
            raise InvalidInputError(
                f"VisionConfig: n_heads must divide d_model, got d_model {self.d_model} and n_heads {self.n_heads}."
            )
        (height, width), (patch_height, patch_width) = self.image_shape, self.patch_shape
        if height % patch_height or width % patch_width:
            raise InvalidInputError(
                f"VisionConfig: patches must fill the image, got image_size {self.image_size} "
                f"and patch_size {self.patch_size}."
            )
        if self.head_input not in ("cls", "cls_mean"):
            raise InvalidInputError(f'VisionConfig: head_input must be "cls" or "cls_mean", got {self.head_input!r}.')
        _ = self.block  # checks what blocks have

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return _pair(self.image_size)

    @property
    def patch_shape(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return _pair(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_shape[0] // self.patch_shape[0], self.image_shape[1] // self.patch_shape[1]

    @property
    def block(self) -> BlockConfig:
        """What the blocks are made of."""
        return BlockConfig(
            d_model=self.d_model,
            n_heads=self.n_heads,
            d_mlp=self.d_mlp,
            activation=self.activation,
            norm_eps=self.norm_eps,
            attention_bias=self.qkv_bias,
            output_bias=True,
            layer_scale=self.layer_scale,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            backend=self.backend,
        )

    @property
    def n_patches(self) -> int:
        """Patches of an image; there is one token more, CLS."""
        return self.grid[0] * self.grid[1]

    @property
    def n_ctx(self) -> int:
        """Tokens of an image: CLS and the patches."""
        return self.n_patches + 1

    @property
    def n_parameters(self) -> int:
        """Numbers that training changes."""
        d, (height, width) = self.d_model, self.patch_shape
        total = self.n_channels * height * width * d + d
        total += (self.n_ctx + 1 + self.mask_token) * d + 2 * d
        total += self.n_layers * block_parameters(self.block)
        total += (d + 1) * (self.d_pooled or 0)
        return total + (self.d_head_input + 1) * (self.n_classes or 0)

    def flops(self, length: int | None = None) -> int:
        """Floating-point operations of the matrix products of one image, forward (2 per multiply-add).

        Parameters
        ----------
        length
            Tokens; default: those of the image.
        """
        length = self.n_ctx if length is None else length
        height, width = self.patch_shape
        total = self.n_layers * block_flops(self.block, length)
        total += 2 * (length - 1) * self.n_channels * height * width * self.d_model
        return total + 2 * self.d_model * (self.d_pooled or 0) + 2 * self.d_head_input * (self.n_classes or 0)

    @property
    def d_head_input(self) -> int:
        """Width of what the head sees."""
        return self.d_model if self.head_input == "cls" else 2 * self.d_model


class Vision(nn.Module):
    """ViT or DINOv2, with or without pooler and head.

    Examples
    --------
    >>> config = VisionConfig(image_size=8, patch_size=4, d_model=8, n_heads=2, n_layers=1, d_mlp=16)
    >>> output = Vision(config)(torch.zeros(1, 3, 8, 8), weights=True)
    >>> output.hidden.shape, output.weights["encoder"][0].shape
    (torch.Size([1, 5, 8]), torch.Size([1, 2, 5, 5]))
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        self.patches = nn.Conv2d(config.n_channels, d, kernel_size=config.patch_shape, stride=config.patch_shape)
        self.cls = nn.Parameter(torch.empty(1, 1, d))
        self.positions = nn.Parameter(torch.empty(1, config.n_ctx, d))
        self.mask_token = nn.Parameter(torch.zeros(1, d)) if config.mask_token else None
        for start in (self.cls, self.positions):
            nn.init.trunc_normal_(start, std=0.02)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config.block) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(d, eps=config.norm_eps)
        self.pooler = None if config.d_pooled is None else nn.Linear(d, config.d_pooled)
        self.head = None if config.n_classes is None else nn.Linear(config.d_head_input, config.n_classes)

    @property
    def n_parameters(self) -> int:
        """Number of trainable numbers."""
        return count_parameters(self)

    def embed(self, images: Tensor, *, masked: Tensor | None = None) -> Tensor:
        """Tokens (B, T, d_model) of images, with positions; arguments as in :meth:`forward`."""
        self._check(images, masked)
        x_BND = self.patches(images).flatten(2).mT
        if masked is not None and self.mask_token is not None:
            x_BND = torch.where(masked[..., None], self.mask_token, x_BND)
        cls_B1D = self.cls.expand(len(x_BND), 1, -1)
        return torch.cat((cls_B1D, x_BND), dim=1) + self.positions

    def forward(self, images: Tensor, *, masked: Tensor | None = None, weights: bool = False) -> ModelOutput:
        """Tokens of images after all blocks and the last norm.

        Parameters
        ----------
        images
            (B, C, height, width), scaled as the model was trained; of the size in the config.
        masked
            (B, N) bool, True where the mask token takes the place of the patch.
        weights
            Whether to return the patterns.

        Returns
        -------
        ModelOutput
            ``hidden`` (B, T, d_model); ``logits`` (B, n_classes), None without head; ``pooled`` (B, d_pooled), or CLS
            where there is no pooler; ``weights["encoder"]``, one (B, H, T, T) per block.
        """
        x_BTD = self.dropout(self.embed(images, masked=masked))
        patterns: list[Tensor] = []
        for block in self.blocks:
            x_BTD, pattern, _ = block(x_BTD, weights=weights)
            if weights:
                patterns.append(pattern)
        hidden = self.norm(x_BTD)
        logits = None if self.head is None else self.head(self._head_input(hidden))
        return ModelOutput(
            hidden=hidden,
            logits=logits,
            weights={"encoder": patterns} if weights else None,
            pooled=self._pool(hidden),
        )

    def _pool(self, hidden: Tensor) -> Tensor:
        return hidden[:, 0] if self.pooler is None else torch.tanh(self.pooler(hidden[:, 0]))

    def _head_input(self, hidden: Tensor) -> Tensor:
        cls = hidden[:, 0]
        return cls if self.config.head_input == "cls" else torch.cat((cls, hidden[:, 1:].mean(1)), dim=-1)

    def _check(self, images: Tensor, masked: Tensor | None) -> None:
        expected = (self.config.n_channels, *self.config.image_shape)
        if not isinstance(images, Tensor):
            raise InvalidInputError(f"Vision: images must be a tensor, got {type(images).__name__}.")
        if images.ndim != 4 or images.shape[1:] != expected:
            raise InvalidInputError(
                f"Vision: images must have the shape (B, {', '.join(map(str, expected))}), got {tuple(images.shape)}. "
                "Positions are not interpolated: resize the images."
            )
        if not images.is_floating_point():
            raise InvalidInputError(f"Vision: images must be of a floating-point dtype, got {images.dtype}.")
        if masked is None:
            return
        if self.mask_token is None:
            raise InvalidInputError("Vision: masked must be None for a model without mask token.")
        shape = (len(images), self.config.n_patches)
        if masked.dtype != torch.bool or masked.shape != shape:
            raise InvalidInputError(
                f"Vision: masked must be bool of the shape {shape}, got {masked.dtype} {tuple(masked.shape)}."
            )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
