"""Configurations of BERT, GPT-2 and Llama checkpoints, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attsvm.errors import InvalidInputError, UnsupportedError
from attsvm.models.blocks import GATED
from attsvm.models.checkpoint_names import Family, bert_weights, gpt2_weights, llama_weights
from attsvm.models.decoder import Decoder, DecoderConfig, RotaryScaling
from attsvm.models.encoder import Encoder, EncoderConfig

__all__ = ["ACTIVATION_NAMES", "FAMILIES", "activation_name", "activation_of", "refuse", "require"]

ACTIVATION_NAMES = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
"""Their names of elementwise functions, and ours."""

_GATES = {gate: kind for kind, gate in GATED.items()}
_WRITTEN = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu", "tanh": "tanh"}


def require(content: Mapping[str, Any], name: str) -> Any:
    """A value that config.json must have.

    Raises
    ------
    InvalidInputError
        If it has not.
    """
    if content.get(name) is None:
        raise InvalidInputError(f"from_pretrained: config.json must give {name}, got none.")
    return content[name]


def refuse(content: Mapping[str, Any], **defaults: Any) -> None:
    """Make sure that options this implementation does not have are as given.

    Raises
    ------
    UnsupportedError
        If one is not.
    """
    for name, default in defaults.items():
        value = content.get(name, default)
        if value is not None and value != default:
            raise UnsupportedError(f"from_pretrained: {name} in config.json must be {default!r}, got {value!r}.")


def activation_of(content: Mapping[str, Any], name: str, default: str, *, gated: bool = False) -> str:
    """Our kind of MLP for their activation.

    Raises
    ------
    UnsupportedError
        If there is none.
    """
    theirs = content.get(name, default)
    ours = ACTIVATION_NAMES.get(theirs) if isinstance(theirs, str) else None
    if ours is not None and gated:
        ours = _GATES.get(ours)
    if ours is None:
        raise UnsupportedError(
            f"from_pretrained: {name} in config.json must be one of {', '.join(ACTIVATION_NAMES)}, got {theirs!r}."
        )
    return ours


def activation_name(kind: str) -> str:
    """Their name of the function in our kind of MLP."""
    return _WRITTEN[GATED.get(kind, kind)]


def _architecture(content: Mapping[str, Any]) -> str:
    names = content.get("architectures") or [""]
    return str(names[0])


# ---------------------------------------------------------------------------------------------------------------- BERT


def _read_bert(content: Mapping[str, Any], names: frozenset[str]) -> EncoderConfig:
    refuse(content, is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    return EncoderConfig(
        d_vocab=require(content, "vocab_size"),
        d_model=require(content, "hidden_size"),
        n_layers=require(content, "num_hidden_layers"),
        n_heads=require(content, "num_attention_heads"),
        d_mlp=require(content, "intermediate_size"),
        n_ctx=require(content, "max_position_embeddings"),
        n_segments=content.get("type_vocab_size", 2),
        activation=activation_of(content, "hidden_act", "gelu"),
        norm_eps=content.get("layer_norm_eps", 1e-12),
        pooled="pooler.dense.weight" in names,
        masked_head="cls.predictions.transform.dense.weight" in names,
        tied=content.get("tie_word_embeddings", True),
        next_sentence_head="cls.seq_relationship.weight" in names,
        dropout=content.get("hidden_dropout_prob", 0.1),
        attention_dropout=content.get("attention_probs_dropout_prob", 0.1),
        pad_id=content.get("pad_token_id", 0),
    )


def _write_bert(config: EncoderConfig) -> dict[str, Any]:
    heads = {(True, True): "BertForPreTraining", (True, False): "BertForMaskedLM"}
    if config.next_sentence_head and not config.masked_head:
        architecture = "BertForNextSentencePrediction"
    else:
        architecture = heads.get((config.masked_head, config.next_sentence_head), "BertModel")
    return {
        "architectures": [architecture],
        "vocab_size": config.d_vocab,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_mlp,
        "max_position_embeddings": config.n_ctx,
        "type_vocab_size": config.n_segments,
        "hidden_act": activation_name(config.activation),
        "layer_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "pad_token_id": config.pad_id,
    }


def _is_bert(config: Any) -> bool:
    return (
        isinstance(config, EncoderConfig)
        and config.place == "post"
        and config.n_segments > 0
        and config.d_mlp > 0
        and config.activation not in GATED
    )


# --------------------------------------------------------------------------------------------------------------- GPT-2


def _read_gpt2(content: Mapping[str, Any], names: frozenset[str]) -> DecoderConfig:
    refuse(content, add_cross_attention=False, scale_attn_by_inverse_layer_idx=False)
    d_model, tied = require(content, "n_embd"), content.get("tie_word_embeddings", True)
    return DecoderConfig(
        d_vocab=require(content, "vocab_size"),
        d_model=d_model,
        n_layers=require(content, "n_layer"),
        n_heads=require(content, "n_head"),
        d_mlp=content.get("n_inner") or 4 * d_model,
        n_ctx=require(content, "n_positions"),
        activation=activation_of(content, "activation_function", "gelu_new"),
        norm_eps=content.get("layer_norm_epsilon", 1e-5),
        scale=None if content.get("scale_attn_weights", True) else 1.0,
        head=tied or "lm_head.weight" in names or _architecture(content) != "GPT2Model",
        tied=tied,
        dropout=content.get("resid_pdrop", 0.1),
        attention_dropout=content.get("attn_pdrop", 0.1),
        **_special_ids(content, bos=50256, eos=50256),
    )


def _write_gpt2(config: DecoderConfig) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel" if config.head else "GPT2Model"],
        "vocab_size": config.d_vocab,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_mlp,
        "n_positions": config.n_ctx,
        "activation_function": activation_name(config.activation),
        "layer_norm_epsilon": config.norm_eps,
        "scale_attn_weights": config.scale is None,
        "tie_word_embeddings": config.tied,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
        **_written_ids(config),
    }


def _is_gpt2(config: Any) -> bool:
    return (
        isinstance(config, DecoderConfig)
        and _is_common(config)
        and (config.positions, config.norm) == ("learned", "layer")
        and config.activation not in GATED
        and config.n_kv_heads in (None, config.n_heads)
        and config.d_head in (None, config.d_model // config.n_heads)
        and (config.attention_bias, config.output_bias is not False, config.mlp_bias) == (True, True, True)
        and config.scale in (None, 1.0)
    )


# --------------------------------------------------------------------------------------------------------------- Llama


def _read_llama(content: Mapping[str, Any], names: frozenset[str]) -> DecoderConfig:
    bias, tied = content.get("attention_bias", False), content.get("tie_word_embeddings", False)
    rope = {**(content.get("rope_scaling") or {}), **(content.get("rope_parameters") or {})}
    n_heads = require(content, "num_attention_heads")
    return DecoderConfig(
        d_vocab=require(content, "vocab_size"),
        d_model=require(content, "hidden_size"),
        n_layers=require(content, "num_hidden_layers"),
        n_heads=n_heads,
        d_mlp=require(content, "intermediate_size"),
        n_ctx=require(content, "max_position_embeddings"),
        n_kv_heads=content.get("num_key_value_heads") or n_heads,
        d_head=content.get("head_dim"),
        activation=activation_of(content, "hidden_act", "silu", gated=True),
        norm="rms",
        norm_eps=content.get("rms_norm_eps", 1e-6),
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=content.get("mlp_bias", False),
        positions="rotary",
        rotary_base=rope.get("rope_theta") or content.get("rope_theta") or 10000.0,
        rotary_scaling=_read_scaling(rope),
        head=tied or "lm_head.weight" in names or _architecture(content) != "LlamaModel",
        tied=tied,
        attention_dropout=content.get("attention_dropout", 0.0),
        **_special_ids(content, bos=1, eos=2),
    )


def _read_scaling(rope: Mapping[str, Any]) -> RotaryScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    refuse(rope, partial_rotary_factor=1.0)
    if kind == "default":
        return None
    if kind != "llama3":
        raise UnsupportedError(f"from_pretrained: rope_type in config.json must be default or llama3, got {kind!r}.")
    return RotaryScaling(
        factor=require(rope, "factor"),
        low_frequency_factor=require(rope, "low_freq_factor"),
        high_frequency_factor=require(rope, "high_freq_factor"),
        original_n_ctx=require(rope, "original_max_position_embeddings"),
    )


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": config.rotary_base, "rope_type": "default"}
    if config.rotary_scaling is not None:
        scaling = config.rotary_scaling
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_frequency_factor,
            "high_freq_factor": scaling.high_frequency_factor,
            "original_max_position_embeddings": scaling.original_n_ctx,
        }
    return {
        "architectures": ["LlamaForCausalLM" if config.head else "LlamaModel"],
        "vocab_size": config.d_vocab,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_mlp,
        "max_position_embeddings": config.n_ctx,
        "num_key_value_heads": config.n_kv_heads or config.n_heads,
        "head_dim": config.d_head or config.d_model // config.n_heads,
        "hidden_act": activation_name(config.activation),
        "rms_norm_eps": config.norm_eps,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied,
        "attention_dropout": config.attention_dropout,
        **_written_ids(config),
    }


def _is_llama(config: Any) -> bool:
    return (
        isinstance(config, DecoderConfig)
        and _is_common(config)
        and (config.positions, config.norm) == ("rotary", "rms")
        and config.activation in GATED
        and config.output_bias in (None, config.attention_bias)
        and (config.scale, config.dropout) == (None, 0.0)
    )


# ----------------------------------------------------------------------------------------------------- shared decoders


def _is_common(config: DecoderConfig) -> bool:
    # A tied matrix without a head would come back as a model with one.
    return (
        (config.place, config.parameterization) == ("pre", "KQ")
        and config.d_mlp > 0
        and (config.head or not config.tied)
    )


def _special_ids(content: Mapping[str, Any], *, bos: int, eos: int) -> dict[str, Any]:
    end = content.get("eos_token_id", eos)
    return {
        "bos_id": content.get("bos_token_id", bos),
        "eos_id": tuple(end) if isinstance(end, list) else end,
        "pad_id": content.get("pad_token_id"),
    }


def _written_ids(config: DecoderConfig) -> dict[str, Any]:
    end = list(config.eos_id) if isinstance(config.eos_id, tuple) else config.eos_id
    return {"bos_token_id": config.bos_id, "eos_token_id": end, "pad_token_id": config.pad_id}


FAMILIES = {
    "bert": Family(
        model_type="bert",
        read_config=_read_bert,
        write_config=_write_bert,
        accepts=_is_bert,
        build=Encoder,
        weights=bert_weights,
        prefix="bert.",
        outside=("cls.",),
        headed=lambda config: config.masked_head or config.next_sentence_head,
        unused=(r"embeddings\.(position_ids|token_type_ids)",),
        copies=(
            ("cls.predictions.decoder.weight", "embeddings.word_embeddings.weight"),
            ("cls.predictions.decoder.bias", "cls.predictions.bias"),
        ),
        renamed=((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias")),
    ),
    "gpt2": Family(
        model_type="gpt2",
        read_config=_read_gpt2,
        write_config=_write_gpt2,
        accepts=_is_gpt2,
        build=Decoder,
        weights=gpt2_weights,
        prefix="transformer.",
        outside=("lm_head.",),
        headed=lambda config: config.head,
        unused=(r"h\.\d+\.attn\.(bias|masked_bias)",),
        copies=(("lm_head.weight", "wte.weight"),),
    ),
    "llama": Family(
        model_type="llama",
        read_config=_read_llama,
        write_config=_write_llama,
        accepts=_is_llama,
        build=Decoder,
        weights=llama_weights,
        prefix="model.",
        outside=("lm_head.",),
        headed=lambda config: config.head,
        unused=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
        copies=(("lm_head.weight", "embed_tokens.weight"),),
    ),
}
"""The families of this module by model type."""
