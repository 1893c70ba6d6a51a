"""Configurations and names of BART and T5 checkpoints, read and written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from attsvm.errors import InvalidInputError
from attsvm.models.blocks import GATED
from attsvm.models.checkpoint_names import Family, Weight, layer_norm, linear
from attsvm.models.pretrained_text import activation_name, activation_of, refuse, require
from attsvm.models.seq2seq import Seq2Seq, Seq2SeqConfig

__all__ = ["FAMILIES", "bart_weights", "t5_weights"]

# What other checkpoints hold twice: the embedding, under the names of those who use it.
_EMBEDDINGS = tuple(
    (name, "shared.weight") for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
)

# ---------------------------------------------------------------------------------------------------------------- BART


def _read_bart(content: Mapping[str, Any], names: frozenset[str]) -> Seq2SeqConfig:
    refuse(content, tie_word_embeddings=True)
    return Seq2SeqConfig(
        d_vocab=require(content, "vocab_size"),
        d_model=require(content, "d_model"),
        n_heads=require(content, "encoder_attention_heads"),
        n_layers=require(content, "encoder_layers"),
        d_mlp=require(content, "encoder_ffn_dim"),
        n_decoder_heads=require(content, "decoder_attention_heads"),
        n_decoder_layers=_read_depth(content, "decoder_layers", names),
        d_decoder_mlp=require(content, "decoder_ffn_dim"),
        n_ctx=require(content, "max_position_embeddings"),
        positions="learned",
        position_offset=2,
        activation=activation_of(content, "activation_function", "gelu"),
        embedding_norm=True,
        scale_embedding=content.get("scale_embedding", False),
        logits_bias="final_logits_bias" in names,
        dropout=content.get("dropout", 0.1),
        attention_dropout=content.get("attention_dropout", 0.0),
        **_read_ids(content, pad=1, start=2, eos=2),
    )


def _write_bart(config: Seq2SeqConfig) -> dict[str, Any]:
    encoder, decoder = config.block(decoder=False), config.block(decoder=True)
    return {
        "architectures": ["BartForConditionalGeneration"],
        "vocab_size": config.d_vocab,
        "d_model": config.d_model,
        "encoder_attention_heads": encoder.n_heads,
        "encoder_layers": config.depth(decoder=False),
        "encoder_ffn_dim": encoder.d_mlp,
        "decoder_attention_heads": decoder.n_heads,
        "decoder_layers": config.depth(decoder=True),
        "decoder_ffn_dim": decoder.d_mlp,
        "max_position_embeddings": config.n_ctx,
        "activation_function": activation_name(config.activation),
        "scale_embedding": config.scale_embedding,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        **_write_ids(config),
    }


def _is_bart(config: Any) -> bool:
    return (
        isinstance(config, Seq2SeqConfig)
        and (config.positions, config.position_offset) == ("learned", 2)
        and (config.place, config.norm, config.norm_eps) == ("post", "layer", 1e-5)
        and (config.embedding_norm, config.bias, config.scale) == (True, True, None)
        and (config.tied_head, config.scale_head) == (True, False)
        and config.activation not in GATED
        and config.d_head in (None, config.d_model // config.n_heads)
    )


def bart_weights(config: Seq2SeqConfig) -> Iterator[Weight]:
    """Names of BART."""
    yield Weight("shared.weight", ("tokens.weight",))
    if config.logits_bias:
        yield Weight("final_logits_bias", ("logits_bias",))
    for stack in ("encoder", "decoder"):
        yield Weight(f"{stack}.embed_positions.weight", (f"{stack}.positions.weight",))
        yield from layer_norm(f"{stack}.layernorm_embedding", f"{stack}.embedding_norm")
        attentions = {"attention": "self_attn", "cross": "encoder_attn"}
        if stack == "encoder":
            del attentions["cross"]
        for layer in range(config.depth(decoder=stack == "decoder")):
            theirs, ours = f"{stack}.layers.{layer}", f"{stack}.blocks.{layer}"
            for part, attention in attentions.items():
                for matrix in ("query", "key", "value"):
                    yield from linear(f"{theirs}.{attention}.{matrix[0]}_proj", f"{ours}.{part}.{matrix}")
                yield from linear(f"{theirs}.{attention}.out_proj", f"{ours}.{part}.output")
                yield from layer_norm(f"{theirs}.{attention}_layer_norm", f"{ours}.norms.{part}")
            yield from linear(f"{theirs}.fc1", f"{ours}.mlp.up")
            yield from linear(f"{theirs}.fc2", f"{ours}.mlp.down")
            yield from layer_norm(f"{theirs}.final_layer_norm", f"{ours}.norms.mlp")


# ------------------------------------------------------------------------------------------------------------------ T5


def _read_t5(content: Mapping[str, Any], names: frozenset[str]) -> Seq2SeqConfig:
    # Version 1.0 divides what enters the head, which is the embedding. Version 1.1 does not, and has a head of its own;
    # transformers 5 may tie it all the same, and then says in another key that nothing is divided.
    scale_head = content.get("scale_decoder_outputs", content.get("tie_word_embeddings", True))
    dropout, decoder_depth = content.get("dropout_rate", 0.1), content.get("num_decoder_layers")
    return Seq2SeqConfig(
        d_vocab=require(content, "vocab_size"),
        d_model=require(content, "d_model"),
        n_heads=require(content, "num_heads"),
        n_layers=require(content, "num_layers"),
        n_decoder_layers=_read_depth(content, "num_decoder_layers" if decoder_depth else "num_layers", names),
        d_mlp=require(content, "d_ff"),
        d_head=require(content, "d_kv"),
        positions="relative",
        n_buckets=content.get("relative_attention_num_buckets", 32),
        max_distance=content.get("relative_attention_max_distance", 128),
        place="pre",
        norm="rms",
        norm_eps=content.get("layer_norm_epsilon", 1e-6),
        activation=_read_mlp(content),
        bias=False,
        scale=1.0,
        scale_embedding=False,
        tied_head=scale_head or "lm_head.weight" not in names,
        scale_head=scale_head,
        dropout=dropout,
        attention_dropout=dropout,
        **_read_ids(content, pad=0, start=0, eos=1),
    )


def _read_mlp(content: Mapping[str, Any]) -> str:
    kind = str(content.get("feed_forward_proj", "relu"))
    # What the checkpoints call gated-gelu is the approximation by tanh.
    function = "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
    name = "feed_forward_proj"
    return activation_of({name: function}, name, "relu", gated=kind.startswith("gated-"))


def _write_t5(config: Seq2SeqConfig) -> dict[str, Any]:
    function = activation_name(config.activation)
    if config.activation in GATED:
        function = "gated-gelu" if function == "gelu_new" else f"gated-{function}"
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": config.d_vocab,
        "d_model": config.d_model,
        "num_heads": config.n_heads,
        "num_layers": config.depth(decoder=False),
        "num_decoder_layers": config.depth(decoder=True),
        "d_ff": config.d_mlp,
        "d_kv": config.d_head or config.d_model // config.n_heads,
        "relative_attention_num_buckets": config.n_buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": function,
        "tie_word_embeddings": config.scale_head,
        "scale_decoder_outputs": config.scale_head,
        "dropout_rate": config.dropout,
        **_write_ids(config),
    }


def _is_t5(config: Any) -> bool:
    return (
        isinstance(config, Seq2SeqConfig)
        and (config.positions, config.place, config.norm) == ("relative", "pre", "rms")
        and (config.bias, config.scale, config.logits_bias) == (False, 1.0, False)
        and (config.embedding_norm, config.scale_embedding) == (False, False)
        and (config.tied_head or not config.scale_head)
        # transformers takes "gated-gelu" for the approximation, and has no name for the other.
        and config.activation != "geglu"
        and config.n_decoder_heads in (None, config.n_heads)
        and config.d_decoder_mlp in (None, config.d_mlp)
        and config.attention_dropout == config.dropout
    )


def t5_weights(config: Seq2SeqConfig) -> Iterator[Weight]:
    """Names of T5, whose first layers hold the relative bias of all."""
    yield Weight("shared.weight", ("tokens.weight",))
    if not config.tied_head:
        yield Weight("lm_head.weight", ("head.weight",))
    for stack in ("encoder", "decoder"):
        first = f"{stack}.block.0.layer.0.SelfAttention"
        yield Weight(f"{first}.relative_attention_bias.weight", (f"{stack}.relative_bias.weight",))
        parts = {"attention": "SelfAttention", "cross": "EncDecAttention", "mlp": "DenseReluDense"}
        if stack == "encoder":
            del parts["cross"]
        for layer in range(config.depth(decoder=stack == "decoder")):
            ours = f"{stack}.blocks.{layer}"
            for place, (part, module) in enumerate(parts.items()):
                theirs = f"{stack}.block.{layer}.layer.{place}"
                for matrix, letter in _t5_matrices(part, gated=config.activation in GATED).items():
                    yield from linear(f"{theirs}.{module}.{letter}", f"{ours}.{part}.{matrix}", bias=False)
                yield Weight(f"{theirs}.layer_norm.weight", (f"{ours}.norms.{part}.weight",))
        yield Weight(f"{stack}.final_layer_norm.weight", (f"{stack}.norm.weight",))


def _t5_matrices(part: str, *, gated: bool) -> dict[str, str]:
    if part != "mlp":
        return {"query": "q", "key": "k", "value": "v", "output": "o"}
    return {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}


# -------------------------------------------------------------------------------------------------------------- shared


def _read_depth(content: Mapping[str, Any], name: str, names: frozenset[str]) -> int:
    """Number of decoder layers; more than there are tensors is damage, and would make a table without end."""
    depth: int = require(content, name)
    if depth > len(names):
        raise InvalidInputError(
            f"from_pretrained: {name} in config.json must be the layers of the weights, got {depth} for {len(names)} "
            "tensors."
        )
    return depth


def _read_ids(content: Mapping[str, Any], *, pad: int, start: int, eos: int) -> dict[str, Any]:
    end = content.get("eos_token_id", eos)
    return {
        "pad_id": content.get("pad_token_id", pad),
        "start_id": content.get("decoder_start_token_id", start),
        "eos_id": tuple(end) if isinstance(end, list) else end,
    }


def _write_ids(config: Seq2SeqConfig) -> dict[str, Any]:
    end = list(config.eos_id) if isinstance(config.eos_id, tuple) else config.eos_id
    return {
        "is_encoder_decoder": True,
        "pad_token_id": config.pad_id,
        "decoder_start_token_id": config.start_id,
        "eos_token_id": end,
    }


FAMILIES = {
    "bart": Family(
        model_type="bart",
        read_config=_read_bart,
        write_config=_write_bart,
        accepts=_is_bart,
        build=Seq2Seq,
        weights=bart_weights,
        prefix="model.",
        outside=("final_logits_bias", "lm_head."),
        headed=lambda config: True,
        copies=_EMBEDDINGS,
    ),
    "t5": Family(
        model_type="t5",
        read_config=_read_t5,
        write_config=_write_t5,
        accepts=_is_t5,
        build=Seq2Seq,
        weights=t5_weights,
        # Old files hold a bias for cross-attention, which has never been used.
        unused=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
        copies=_EMBEDDINGS,
    ),
}
"""The families of this module by model type."""
