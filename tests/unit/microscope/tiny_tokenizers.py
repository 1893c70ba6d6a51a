"""Tokenizers and models small enough to be made in a test: one for each way in which a vocabulary writes text."""

from __future__ import annotations

import json
from typing import Any

import torch

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A quick fox doesn't jump over unbelievably lazy dogs, does it?",
    "Dogs and foxes are quick and brown and lazy.",
]

BIDI = "\u202e"
HOSTILE = [
    "<script>alert('x')</script><img src=x onerror=alert(1)>",
    "null \x00 bell \x07 escape \x1b[31m tab\tline\nend",
    f"turned {BIDI}around\u202c and \u2066isolated\u2069",
    "family \U0001f469\u200d\U0001f469\u200d\U0001f467 flag \U0001f1eb\U0001f1f7 hand \U0001f44d\U0001f3fd",
    "שלום עולם مرحبا بالعالم",
    "half \ud800 of a pair",
    "e\u0301 combining, soft\u00adhyphen, \ufeffmark, \u00a0space",
    "</script>&lt;b&gt;\"'`${x}`",
]


def trained(kind: str) -> Any:
    """A tokenizer of transformers: ``bert``, ``gpt2``, ``llama`` or ``t5``."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "bert":
        names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        names["mask_token"] = "[MASK]"
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=120, special_tokens=list(names.values()))
    elif kind == "gpt2":
        names = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    elif kind == "llama":
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(steps)
        trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=list(names.values()))
    else:
        names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=list(names.values()), unk_token="<unk>")
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    if kind == "llama":
        tokenizer = with_bytes(tokenizer)
    frames = {"bert": ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"), "llama": ("<s> $A", "<s> $A $B")}
    frames["t5"] = ("$A </s>", "$A </s> $B </s>")
    if kind in frames:
        used = {token for token in names.values() if token in " ".join(frames[kind])}
        tokenizer.post_processor = processors.TemplateProcessing(
            single=frames[kind][0],
            pair=frames[kind][1],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in sorted(used)],
        )
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if kind == "bert" else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **names)


def with_bytes(tokenizer: Any) -> Any:
    """The same with a token for each byte, to spell what the vocabulary has no token for."""
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    state["model"]["byte_fallback"] = True
    return type(tokenizer).from_str(json.dumps(state))


SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}


def tiny(family: str, d_vocab: int = 400, n_ctx: int = 64, **given: Any) -> Any:
    """A model of transformers with random weights, in evaluation mode."""
    import transformers as hf

    common = {"vocab_size": d_vocab, "max_position_embeddings": n_ctx}
    of_decoder = {"vocab_size": d_vocab, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    of_bart = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    of_bart |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    picture = {"image_size": 24, "patch_size": 8, **SIZES}
    made: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "bert": (hf.BertModel, hf.BertConfig, {**SIZES, **common}),
        "roberta": (hf.RobertaModel, hf.RobertaConfig, {**SIZES, **common, "pad_token_id": 1}),
        "gpt2": (
            hf.GPT2Model,
            hf.GPT2Config,
            {
                "vocab_size": d_vocab,
                "n_positions": n_ctx,
                "n_embd": 32,
                "n_head": 4,
                "n_layer": 2,
                "bos_token_id": 0,
                "eos_token_id": 0,
            },
        ),
        "opt": (
            hf.OPTModel,
            hf.OPTConfig,
            {**SIZES, **common, "ffn_dim": 48, "word_embed_proj_dim": 32},
        ),
        "llama": (hf.LlamaModel, hf.LlamaConfig, {**SIZES, **common, "num_key_value_heads": 2}),
        "t5": (hf.T5ForConditionalGeneration, hf.T5Config, {**of_decoder, "decoder_start_token_id": 0}),
        "bart": (hf.BartForConditionalGeneration, hf.BartConfig, {**of_bart, **common}),
        "vit": (hf.ViTModel, hf.ViTConfig, picture),
        "dinov2": (hf.Dinov2Model, hf.Dinov2Config, picture),
        "registers": (hf.Dinov2WithRegistersModel, hf.Dinov2WithRegistersConfig, {**picture, "num_register_tokens": 4}),
        "swin": (
            hf.SwinModel,
            hf.SwinConfig,
            {
                "image_size": 32,
                "patch_size": 4,
                "window_size": 4,
                "embed_dim": 16,
                "depths": [1, 1],
                "num_heads": [2, 2],
            },
        ),
    }
    model, config, sizes = made[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return model(config(**{**sizes, **given})).eval()
