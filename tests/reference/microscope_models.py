"""Tiny models with random weights, one for each family of transformers that the microscope is checked on.

``python -m tests.reference.microscope_models > docs/families.md``, in the root of the repository, writes the table of
these families anew; a test compares the table with that file.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def sizes(**named: Any) -> dict[str, Any]:
    """Fields of a configuration."""
    return named


SIZES = sizes(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
NO_TOKENS = sizes(bos_token_id=None, eos_token_id=None, pad_token_id=0)
PLAIN_ROPE = sizes(rope_type="default", rope_theta=10000.0)
GPT2 = sizes(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, **NO_TOKENS)
OWN_WIDTH = sizes(num_key_value_heads=2, max_position_embeddings=64, **NO_TOKENS)
GROUPED = sizes(head_dim=8, **OWN_WIDTH)
BART = sizes(
    vocab_size=99,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=37,
    decoder_ffn_dim=37,
    max_position_embeddings=64,
    decoder_start_token_id=2,
    forced_eos_token_id=None,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
T5 = sizes(vocab_size=99, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, decoder_start_token_id=0)
PICTURE = sizes(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, image_size=12)

Inputs = dict[str, Tensor]


def texts(padding: str) -> Inputs:
    """Two texts of 7 and 4 tokens."""
    ids = torch.randint(3, 99, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 7, dtype=torch.int64)
    padded = slice(0, 3) if padding == "left" else slice(4, 7)
    mask[1, padded] = 0
    ids[1, padded] = 0
    return {"input_ids": ids, "attention_mask": mask}


def pairs(padding: str) -> Inputs:
    """Sources of 7 and 4 tokens, targets of 5 and 3."""
    ids = torch.randint(3, 99, (2, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    return {**texts(padding), "decoder_input_ids": ids, "decoder_attention_mask": mask}


def pictures(padding: str) -> Inputs:
    """Two pictures of 12 x 12."""
    return {"pixel_values": torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(3))}


def sounds(padding: str) -> Inputs:
    """Two sounds of 40 frames, with texts."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 99, (2, 5), generator=generator)
    return {"input_features": torch.randn(2, 8, 40, generator=generator), "decoder_input_ids": ids}


@dataclass(frozen=True)
class Tiny:
    """How to make a tiny model of a family, and inputs for it."""

    family: str
    config: str
    model: str
    sizes: dict[str, Any] = field(default_factory=lambda: dict(SIZES))
    inputs: Callable[[str], Inputs] = texts

    def build(self) -> nn.Module:
        transformers = importlib.import_module("transformers")
        config = getattr(transformers, self.config)(**self.sizes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = getattr(transformers, self.model)(config)
            for parameter in model.parameters():
                # Larger than at the start of training, so that heads differ and sinks and biases count.
                nn.init.normal_(parameter, std=0.3)
        return model.eval()


def plain(family: str, name: str, **sizes: Any) -> Tiny:
    return Tiny(family, f"{name}Config", f"{name}Model", {**SIZES, **sizes})


MODELS = [
    plain("bert", "Bert"),
    plain("mpnet", "MPNet"),
    plain("roberta", "Roberta"),
    plain("xlm-roberta", "XLMRoberta"),
    plain("camembert", "Camembert"),
    plain("electra", "Electra", embedding_size=16),
    plain("albert", "Albert", embedding_size=16),
    Tiny(
        "distilbert",
        "DistilBertConfig",
        "DistilBertModel",
        sizes(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=37),
    ),
    plain("modernbert", "ModernBert", **NO_TOKENS, cls_token_id=1, sep_token_id=2, local_attention=4),
    Tiny("gpt2", "GPT2Config", "GPT2Model", GPT2),
    plain("gpt_neox", "GPTNeoX", max_position_embeddings=64, **NO_TOKENS),
    Tiny("gpt_bigcode", "GPTBigCodeConfig", "GPTBigCodeModel", GPT2),
    plain("llama", "Llama", **GROUPED),
    plain("mistral", "Mistral", **GROUPED, sliding_window=3),
    plain("mixtral", "Mixtral", **GROUPED, num_local_experts=2),
    plain("qwen2", "Qwen2", **GROUPED),
    plain("qwen3", "Qwen3", **GROUPED),
    plain("gemma", "Gemma", **GROUPED),
    plain("gemma2", "Gemma2", **GROUPED, sliding_window=3, attn_logit_softcapping=2.0),
    Tiny("gemma3_text", "Gemma3TextConfig", "Gemma3TextModel", {**SIZES, **GROUPED, "sliding_window": 3}),
    plain("phi", "Phi", max_position_embeddings=64, **NO_TOKENS),
    plain("phi3", "Phi3", max_position_embeddings=64, original_max_position_embeddings=64, **NO_TOKENS),
    plain("olmo", "Olmo", max_position_embeddings=64, **NO_TOKENS),
    plain("olmo2", "Olmo2", max_position_embeddings=64, **NO_TOKENS),
    plain("granite", "Granite", **OWN_WIDTH, attention_multiplier=0.3),
    plain("stablelm", "StableLm", **OWN_WIDTH),
    plain("starcoder2", "Starcoder2", **GROUPED),
    plain("cohere", "Cohere", **OWN_WIDTH),
    plain(
        "gpt_oss",
        "GptOss",
        **GROUPED,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=3,
        rope_parameters=PLAIN_ROPE,
    ),
    Tiny("smollm3", "SmolLM3Config", "SmolLM3Model", {**SIZES, **GROUPED}),
    Tiny(
        "opt",
        "OPTConfig",
        "OPTModel",
        sizes(
            vocab_size=99,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=37,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
            **NO_TOKENS,
        ),
    ),
    Tiny("bart", "BartConfig", "BartModel", BART, pairs),
    Tiny("mbart", "MBartConfig", "MBartModel", BART, pairs),
    Tiny("marian", "MarianConfig", "MarianModel", BART, pairs),
    Tiny("pegasus", "PegasusConfig", "PegasusModel", BART, pairs),
    Tiny("t5", "T5Config", "T5Model", T5, pairs),
    Tiny("umt5", "UMT5Config", "UMT5Model", T5, pairs),
    Tiny(
        "whisper",
        "WhisperConfig",
        "WhisperModel",
        {**BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 30},
        sounds,
    ),
    Tiny("vit", "ViTConfig", "ViTModel", {**PICTURE, "patch_size": 4}, pictures),
    Tiny("deit", "DeiTConfig", "DeiTModel", {**PICTURE, "patch_size": 4}, pictures),
    Tiny("dinov2", "Dinov2Config", "Dinov2Model", {**PICTURE, "patch_size": 4}, pictures),
    Tiny(
        "clip_text_model",
        "CLIPTextConfig",
        "CLIPTextModel",
        {**SIZES, "max_position_embeddings": 64, **NO_TOKENS, "eos_token_id": 2},
        lambda _: texts("right"),
    ),
    Tiny("clip_vision_model", "CLIPVisionConfig", "CLIPVisionModel", {**PICTURE, "patch_size": 4}, pictures),
    Tiny("siglip_vision_model", "SiglipVisionConfig", "SiglipVisionModel", {**PICTURE, "patch_size": 4}, pictures),
    Tiny(
        "gpt_neo",
        "GPTNeoConfig",
        "GPTNeoModel",
        sizes(
            vocab_size=99,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            window_size=3,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=64,
            **NO_TOKENS,
        ),
    ),
    Tiny("gptj", "GPTJConfig", "GPTJModel", {**GPT2, "rotary_dim": 4}),
    Tiny("codegen", "CodeGenConfig", "CodeGenModel", {**GPT2, "rotary_dim": 4}),
    Tiny("bloom", "BloomConfig", "BloomModel", sizes(vocab_size=99, hidden_size=32, n_layer=2, n_head=4, **NO_TOKENS)),
    Tiny(
        "falcon",
        "FalconConfig",
        "FalconModel",
        sizes(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **NO_TOKENS),
    ),
    plain(
        "gpt_neox_japanese", "GPTNeoXJapanese", max_position_embeddings=64, intermediate_multiple_size=2, **NO_TOKENS
    ),
    Tiny(
        "deberta-v2",
        "DebertaV2Config",
        "DebertaV2Model",
        {**SIZES, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_position_embeddings": 64},
    ),
]
"""The families, in the order of the table."""

INTRODUCTION = """\
# Families of models

What `attsvm inspect` was checked on: a tiny model of each family with random weights, two texts of different lengths
with padding on the left and on the right (or two pictures, or two sounds). For each, the attention weights that follow
from the captured queries, keys, masks and offsets are those that the model itself returns with eager attention, to
1e-5; the output of the model while it is captured is the same to the last bit; and nothing in the model has changed
afterwards. The test that checks this makes this table, too. Families that are not named here are likely to work where
their attention goes through transformers' attention interface: every run begins with the same check on the model given
and reports its result.

*Heard by*: the attention interface of transformers, or hooks made for the family. *Logits*: what they have beside
products of queries and keys. *Residual space*: whether every head is one matrix on the hidden states that its layer is
given; every head of every family has a max-margin problem in score space.
"""

OTHERS = """\
## Families that cannot be inspected

Attention of these families has other shapes than queries x keys, or none of it can be read. Weights that such a model
returns can be given to `from_attentions(attentions, tokens)`.
"""


def document() -> str:
    """The page docs/families.md."""
    from attsvm.microscope.families import describe
    from attsvm.microscope.reasons import REASONS

    rows = ["| family | class | heard by | attention | logits | residual space |", "|---|---|---|---|---|---|"]
    for tiny in MODELS:
        found = describe(tiny.build())
        kinds = dict.fromkeys(module.info.kind for module in found.modules)
        terms = dict.fromkeys(term for module in found.modules for term in module.terms)
        if any(module.info.n_kv_heads < module.info.n_heads for module in found.modules):
            terms["grouped heads"] = None
        reasons = {module.residual for module in found.modules if module.residual}
        residual = "; ".join(f"no: {reason}" for reason in sorted(reasons)) or "yes"
        cells = tiny.family, f"`{tiny.model}`", found.tier, ", ".join(kinds), ", ".join(terms), residual
        rows.append("| " + " | ".join(cells) + " |")
    others = ["| family | why |", "|---|---|", *(f"| {family} | {reason} |" for family, reason in REASONS.items())]
    return "\n".join([INTRODUCTION, *rows, "", OTHERS, *others]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(document())
