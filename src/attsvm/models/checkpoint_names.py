"""Which weight of a Hugging Face checkpoint is which of ours: one table per family, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attsvm.errors import InvalidInputError
from attsvm.models.decoder import DecoderConfig
from attsvm.models.encoder import EncoderConfig

__all__ = ["Family", "Weight", "bert_weights", "gpt2_weights", "layer_norm", "linear", "llama_weights"]


@dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint.

    Parameters
    ----------
    theirs
        Its name, without the prefix of the family.
    ours
        The parameters that make it, one after the other along the first axis.
    transposed
        Whether the checkpoint holds it as (in, out), where ``nn.Linear`` has (out, in).
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False

    def split(self, tensor: Tensor, sizes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Our parameters, of the given sizes, from their tensor.

        Raises
        ------
        InvalidInputError
            If the tensor has another shape.
        """
        shapes = [sizes[name] for name in self.ours]
        expected = [sum(shape[0] for shape in shapes), *shapes[0][1:]]
        found = tensor.t() if self.transposed and tensor.ndim == 2 else tensor
        if list(found.shape) != expected:
            wanted = expected[::-1] if self.transposed else expected
            raise InvalidInputError(
                f"from_pretrained: the weight {self.theirs} must have the shape {tuple(wanted)} that config.json gives "
                f"it, got {tuple(tensor.shape)}."
            )
        return dict(zip(self.ours, torch.split(found, [shape[0] for shape in shapes])))

    def join(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Their tensor from our parameters."""
        tensor = torch.cat([parameters[name].detach() for name in self.ours])
        return tensor.t().contiguous() if self.transposed else tensor


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of checkpoint: how to read its configuration, build the model, and find each weight.

    Parameters
    ----------
    model_type
        As config.json has it.
    read_config
        Makes our configuration of the content of config.json and the names of the weights without prefix.
    write_config
        Makes the content of config.json of our configuration, ``model_type`` excepted.
    accepts
        Whether a configuration of ours can be written as this family.
    build
        Makes the model.
    weights
        The table of weights.
    prefix
        What models with a head put before the names of the body, such as ``bert.``.
    outside
        Beginnings of the names that never carry it: those of the heads.
    headed
        Whether a model of this configuration writes the prefix; None if none does.
    unused
        Patterns of names that hold no weight: buffers that follow from the configuration.
    copies
        Name and original of tensors that some files hold twice; they must be equal.
    renamed
        Pattern and replacement of names that were different once.
    """

    model_type: str
    read_config: Callable[[Mapping[str, Any], frozenset[str]], Any]
    write_config: Callable[[Any], dict[str, Any]]
    accepts: Callable[[Any], bool]
    build: Callable[[Any], nn.Module]
    weights: Callable[[Any], Iterable[Weight]]
    prefix: str = ""
    outside: tuple[str, ...] = ()
    headed: Callable[[Any], bool] | None = None
    unused: tuple[str, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()

    def plain_name(self, name: str) -> str:
        """A name of a file without prefix, spelled as today."""
        for pattern, replacement in self.renamed:
            name = re.sub(pattern, replacement, name)
        return name.removeprefix(self.prefix)

    def full_name(self, name: str, config: Any) -> str:
        """The name in a file that is written."""
        headed = self.headed is not None and self.headed(config)
        return self.prefix + name if headed and not any(map(name.startswith, self.outside)) else name

    def is_unused(self, name: str) -> bool:
        """Whether a plain name is that of a known buffer."""
        return any(re.fullmatch(pattern, name) for pattern in self.unused)


def linear(theirs: str, ours: str, *, bias: bool = True, transposed: bool = False) -> Iterator[Weight]:
    """Weight, and bias, of a linear map."""
    yield Weight(f"{theirs}.weight", (f"{ours}.weight",), transposed)
    if bias:
        yield Weight(f"{theirs}.bias", (f"{ours}.bias",))


def layer_norm(theirs: str, ours: str) -> Iterator[Weight]:
    """Weight and bias of a layer normalisation."""
    return linear(theirs, ours)


def bert_weights(config: EncoderConfig) -> Iterator[Weight]:
    """Names of BERT."""
    yield Weight("embeddings.word_embeddings.weight", ("tokens.weight",))
    yield Weight("embeddings.position_embeddings.weight", ("positions.weight",))
    yield Weight("embeddings.token_type_embeddings.weight", ("segments.weight",))
    yield from layer_norm("embeddings.LayerNorm", "norm")
    for layer in range(config.n_layers):
        theirs, ours = f"encoder.layer.{layer}", f"blocks.{layer}"
        for part in ("query", "key", "value"):
            yield from linear(f"{theirs}.attention.self.{part}", f"{ours}.attention.{part}")
        yield from linear(f"{theirs}.attention.output.dense", f"{ours}.attention.output")
        yield from layer_norm(f"{theirs}.attention.output.LayerNorm", f"{ours}.norms.attention")
        yield from linear(f"{theirs}.intermediate.dense", f"{ours}.mlp.up")
        yield from linear(f"{theirs}.output.dense", f"{ours}.mlp.down")
        yield from layer_norm(f"{theirs}.output.LayerNorm", f"{ours}.norms.mlp")
    if config.pooled:
        yield from linear("pooler.dense", "pooler")
    if config.masked_head:
        yield from linear("cls.predictions.transform.dense", "head.transform")
        yield from layer_norm("cls.predictions.transform.LayerNorm", "head.norm")
        yield Weight("cls.predictions.bias", ("head.decoder.bias",))
        if not config.tied:
            # Two names of one bias: transformers adds the second and keeps the first.
            yield from linear("cls.predictions.decoder", "head.decoder")
    if config.next_sentence_head:
        yield from linear("cls.seq_relationship", "next_sentence")


def gpt2_weights(config: DecoderConfig) -> Iterator[Weight]:
    """Names of GPT-2, whose matrices are (in, out) and whose queries, keys and values are one."""
    yield Weight("wte.weight", ("tokens.weight",))
    yield Weight("wpe.weight", ("positions.weight",))
    for layer in range(config.n_layers):
        theirs, ours = f"h.{layer}", f"blocks.{layer}"
        yield from layer_norm(f"{theirs}.ln_1", f"{ours}.norms.attention")
        for kind in ("weight", "bias"):
            parts = tuple(f"{ours}.attention.{part}.{kind}" for part in ("query", "key", "value"))
            yield Weight(f"{theirs}.attn.c_attn.{kind}", parts, kind == "weight")
        yield from linear(f"{theirs}.attn.c_proj", f"{ours}.attention.output", transposed=True)
        yield from layer_norm(f"{theirs}.ln_2", f"{ours}.norms.mlp")
        yield from linear(f"{theirs}.mlp.c_fc", f"{ours}.mlp.up", transposed=True)
        yield from linear(f"{theirs}.mlp.c_proj", f"{ours}.mlp.down", transposed=True)
    yield from layer_norm("ln_f", "norm")
    yield from _own_head(config)


def llama_weights(config: DecoderConfig) -> Iterator[Weight]:
    """Names of Llama and of the models built like it."""
    yield Weight("embed_tokens.weight", ("tokens.weight",))
    output_bias = config.attention_bias if config.output_bias is None else config.output_bias
    for layer in range(config.n_layers):
        theirs, ours = f"layers.{layer}", f"blocks.{layer}"
        yield Weight(f"{theirs}.input_layernorm.weight", (f"{ours}.norms.attention.weight",))
        for part, bias in _parts(config.attention_bias, output_bias):
            yield from linear(f"{theirs}.self_attn.{part[0]}_proj", f"{ours}.attention.{part}", bias=bias)
        yield Weight(f"{theirs}.post_attention_layernorm.weight", (f"{ours}.norms.mlp.weight",))
        for part in ("gate", "up", "down"):
            yield from linear(f"{theirs}.mlp.{part}_proj", f"{ours}.mlp.{part}", bias=config.mlp_bias)
    yield Weight("norm.weight", ("norm.weight",))
    yield from _own_head(config)


def _parts(bias: bool, output_bias: bool) -> Sequence[tuple[str, bool]]:
    return [("query", bias), ("key", bias), ("value", bias), ("output", output_bias)]


def _own_head(config: DecoderConfig) -> Iterator[Weight]:
    if config.head and not config.tied:
        yield Weight("lm_head.weight", ("head.weight",))
