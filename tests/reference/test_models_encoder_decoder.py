"""Encoder and decoder against transformers: random weights with options crossed; real ones are in tests/weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from attsvm.attention.cache import KeyValueCache
from attsvm.models.encoder import Encoder
from attsvm.models.pretrained import family_of, from_pretrained, save_pretrained

pytestmark = pytest.mark.reference
transformers = pytest.importorskip("transformers")

BERT = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
GPT2 = {
    "vocab_size": 40,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 3,
    "n_positions": 32,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 20,
    "max_position_embeddings": 32,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}

# Every value of every option occurs, with several values of the others.
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("BertModel", "BertConfig", {**BERT}),
    ("BertModel", "BertConfig", {**BERT, "hidden_act": "gelu_new", "type_vocab_size": 3, "layer_norm_eps": 1e-3}),
    ("BertForMaskedLM", "BertConfig", {**BERT, "hidden_act": "relu", "num_attention_heads": 1}),
    ("BertForMaskedLM", "BertConfig", {**BERT, "hidden_act": "silu", "tie_word_embeddings": False}),
    ("BertForPreTraining", "BertConfig", {**BERT, "num_attention_heads": 6}),
    ("GPT2LMHeadModel", "GPT2Config", {**GPT2}),
    ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "tie_word_embeddings": False, "activation_function": "relu"}),
    ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "activation_function": "gelu", "n_inner": 20, "n_head": 1}),
    ("GPT2LMHeadModel", "GPT2Config", {**GPT2, "scale_attn_weights": False, "layer_norm_epsilon": 1e-3}),
    ("GPT2Model", "GPT2Config", {**GPT2, "tie_word_embeddings": False, "n_head": 6}),
    ("LlamaForCausalLM", "LlamaConfig", {**LLAMA}),
    ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "attention_bias": True, "num_key_value_heads": 4, "head_dim": 10}),
    ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "mlp_bias": True, "hidden_act": "gelu", "rms_norm_eps": 1e-3}),
    (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**LLAMA, "attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    ),
    ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    ("LlamaModel", "LlamaConfig", {**LLAMA, "hidden_act": "relu"}),
]


@pytest.fixture(params=range(len(CASES)), ids=lambda i: f"{CASES[i][0]}-{i}")
def case(request: pytest.FixtureRequest) -> tuple[str, str, dict[str, Any]]:
    return CASES[request.param]


@pytest.fixture(autouse=True)
def _exact_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """RMS normalisation of transformers goes by float32 even in float64, which would hide what is compared."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)


def build(case: tuple[str, str, dict[str, Any]], dtype: torch.dtype) -> Any:
    """Their model with random weights, biases and normalisations included."""
    model_name, config_name, options = case
    torch.manual_seed(0)
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3)
            if "norm" in name.lower() or "ln_" in name:
                parameter.add_(1.0)
        if model_name.startswith("Bert") and not model.config.tie_word_embeddings:
            # One parameter under two names in every file that a tied model wrote.
            model.cls.predictions.bias.copy_(model.cls.predictions.decoder.bias)
    return model.to(dtype).eval()


def pair(case: tuple[str, str, dict[str, Any]], folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    theirs = build(case, dtype)
    theirs.save_pretrained(folder)
    ours = from_pretrained(folder)
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    return theirs, ours


def result_of_theirs(output: Any) -> Tensor:
    for name in ("logits", "prediction_logits", "last_hidden_state"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    raise AssertionError(type(output))


def result_of_ours(output: Any) -> Tensor:
    return output.hidden if output.logits is None else output.logits


def ids_of(batch: int, length: int) -> Tensor:
    return torch.randint(3, 40, (batch, length), generator=torch.Generator().manual_seed(1))


TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_logits(case: tuple[str, str, dict[str, Any]], tmp_path: Path, dtype: torch.dtype) -> None:
    theirs, ours = pair(case, tmp_path, dtype)
    ids = ids_of(3, 20)
    with torch.no_grad():
        expected, found = result_of_theirs(theirs(ids)), result_of_ours(ours(ids))
    assert expected.std() > 0.1
    tol = TOLERANCES[dtype]
    torch.testing.assert_close(found, expected, rtol=tol, atol=tol)


def test_pooled_and_next_sentence(tmp_path: Path) -> None:
    theirs, ours = pair(CASES[4], tmp_path, torch.float64)
    ids = ids_of(2, 9)
    segments = (torch.arange(9) > 4).long().expand(2, 9)
    with torch.no_grad():
        expected, found = theirs(ids, token_type_ids=segments), ours(ids, segments=segments)
        pooled = theirs.bert(ids, token_type_ids=segments).pooler_output
        next_sentence = ours.next_sentence(found.pooled)
    torch.testing.assert_close(found.pooled, pooled, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.logits, expected.prediction_logits, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(next_sentence, expected.seq_relationship_logits, rtol=1e-10, atol=1e-10)


def test_weights_of_all_layers(case: tuple[str, str, dict[str, Any]], tmp_path: Path) -> None:
    theirs, ours = pair(case, tmp_path, torch.float32)
    theirs.set_attn_implementation("eager")
    ids, mask = ids_of(2, 7), torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, output_attentions=True).attentions
        found = ours(ids, attention_mask=mask, weights=True).weights
    ((kind, patterns),) = found.items()
    assert kind == ("encoder" if isinstance(ours, Encoder) else "decoder")
    assert len(patterns) == len(expected) == 2
    for pattern, reference in zip(patterns, expected):
        torch.testing.assert_close(pattern[0], reference[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(pattern[1, :, :5], reference[1, :, :5], rtol=1e-5, atol=1e-6)


def gradients(model: nn.Module, result: Tensor) -> dict[str, Tensor]:
    target = torch.randn(result.shape, dtype=result.dtype, generator=torch.Generator().manual_seed(2))
    (result * target).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-4), (torch.float64, 1e-10)], ids=str)
def test_gradients(case: tuple[str, str, dict[str, Any]], tmp_path: Path, dtype: torch.dtype, tol: float) -> None:
    theirs, ours = pair(case, tmp_path, dtype)
    ids = ids_of(2, 12)
    expected = gradients(theirs, result_of_theirs(theirs(ids)))
    found = gradients(ours, result_of_ours(ours(ids)))
    family, sizes = family_of(ours), {name: parameter.shape for name, parameter in ours.named_parameters()}
    compared = set()
    expected = {family.plain_name(name): gradient for name, gradient in expected.items()}
    for weight in family.weights(ours.config):
        if weight.theirs in expected:
            for name, gradient in weight.split(expected[weight.theirs], sizes).items():
                scale = float(gradient.abs().max())
                torch.testing.assert_close(found[name], gradient, rtol=tol, atol=tol * scale + 1e-3 * tol, msg=name)
                compared.add(name)
    assert compared == set(found)
    unread = {"pooler.weight", "pooler.bias", "next_sentence.weight", "next_sentence.bias"}
    assert set(sizes) - compared <= unread


def test_padding(case: tuple[str, str, dict[str, Any]], tmp_path: Path) -> None:
    """On the right as they do by themselves; on the left as they do when told the positions."""
    theirs, ours = pair(case, tmp_path, torch.float64)
    ids, lengths = ids_of(3, 9), torch.tensor([9, 6, 4])
    right = torch.arange(9) < lengths[:, None]
    left = right.flip(1)
    with torch.no_grad():
        for mask in (right, left):
            places = (mask.long().cumsum(1) - 1).clamp(min=0)
            expected = result_of_theirs(theirs(ids, attention_mask=mask.long(), position_ids=places))
            found = result_of_ours(ours(ids, attention_mask=mask))
            torch.testing.assert_close(found[mask], expected[mask], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("index", [i for i, case in enumerate(CASES) if "Bert" not in case[0]])
def test_cached(index: int, tmp_path: Path) -> None:
    theirs, ours = pair(CASES[index], tmp_path, torch.float64)
    ids, cache = ids_of(2, 10), KeyValueCache()
    with torch.no_grad():
        expected = result_of_theirs(theirs(ids))
        found = [result_of_ours(ours(part, cache=cache)) for part in ids.split([5, 1, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-10, atol=1e-10)


def test_what_we_save_transformers_loads(case: tuple[str, str, dict[str, Any]], tmp_path: Path) -> None:
    theirs, ours = pair(case, tmp_path / "theirs", torch.float32)
    save_pretrained(ours, tmp_path / "ours")
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    again, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True, local_files_only=True)
    assert not any(report.values()), report
    ids = ids_of(2, 9)
    with torch.no_grad():
        expected, found = result_of_theirs(theirs(ids)), result_of_theirs(again.eval()(ids))
    assert torch.equal(found, expected)


def test_shards_of_transformers(tmp_path: Path) -> None:
    theirs = build(CASES[10], torch.float32)
    theirs.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    ids = ids_of(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(from_pretrained(tmp_path)(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_parameters_are_theirs(case: tuple[str, str, dict[str, Any]], tmp_path: Path) -> None:
    theirs, ours = pair(case, tmp_path, torch.float32)
    # The untied head of BERT has its bias twice.
    twice = 40 if isinstance(ours, Encoder) and ours.config.masked_head and not ours.config.tied else 0
    assert ours.n_parameters == ours.config.n_parameters == theirs.num_parameters() - twice
