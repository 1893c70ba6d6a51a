"""Hearing attention: order, kinds, names, and a model that is left as it was."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attsvm.errors import InvalidInputError, UnsupportedError
from attsvm.microscope.calls import AttentionCall
from attsvm.microscope.capture import attention_modules, captured, working_inputs
from attsvm.microscope.listening import apart
from attsvm.microscope.reasons import REASONS
from reference.microscope_models import MODELS, pairs, sizes, texts

transformers = pytest.importorskip("transformers")

TINY = {tiny.family: tiny for tiny in MODELS}
SMALL = sizes(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)


def build(family: str, **more: Any) -> Any:
    tiny = TINY[family]
    return replace(tiny, sizes={**tiny.sizes, **more}).build()


def hear(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> list[AttentionCall]:
    calls: list[AttentionCall] = []
    with torch.no_grad(), captured(model, calls.append, **options):
        model(**inputs)
    return calls


def implementations(model: nn.Module) -> list[Any]:
    return [getattr(vars(m).get("config"), "_attn_implementation", None) for m in model.modules()]


def test_kinds_layers_and_sides_are_in_the_order_of_the_run() -> None:
    infos = attention_modules(build("t5"))
    assert [(info.kind, info.layer) for info in infos] == [
        ("encoder", 0),
        ("encoder", 1),
        ("decoder", 0),
        ("cross", 0),
        ("decoder", 1),
        ("cross", 1),
    ]
    assert {(info.kind, info.query_side, info.key_side) for info in infos} == {
        ("encoder", "source", "source"),
        ("decoder", "target", "target"),
        ("cross", "target", "source"),
    }
    assert infos[3].label(2) == "cross.L0.H2"


def test_one_text_has_plain_labels_and_grouped_heads() -> None:
    infos = attention_modules(build("llama"))
    assert [info.label(3) for info in infos] == ["L0.H3", "L1.H3"]
    assert {(info.kind, info.query_side, info.n_heads, info.n_kv_heads, info.d_head) for info in infos} == {
        ("decoder", "source", 4, 2, 8)
    }


def test_the_layer_index_of_a_module_does_not_count() -> None:
    model = build("llama")
    expected = attention_modules(model)
    model = build("llama")
    for module in model.layers:
        module.self_attn.layer_idx = 0
    assert attention_modules(model) == expected


def test_layers_that_share_a_module_have_names_of_their_own() -> None:
    names = [info.name for info in attention_modules(build("albert"))]
    assert names == [names[0], names[0] + "@1"]


def test_decoder_whose_texts_are_of_one_length() -> None:
    model, inputs = build("bart"), pairs("right")
    inputs = {"input_ids": inputs["decoder_input_ids"], "decoder_input_ids": inputs["decoder_input_ids"]}
    kinds = [info.kind for info in attention_modules(model, inputs)]
    assert kinds == ["encoder", "encoder", "decoder", "cross", "decoder", "cross"]


@pytest.mark.parametrize("family", ["bert", "t5", "deberta-v2", "gpt_neo", "bloom"])
def test_an_error_inside_leaves_the_model_as_it_was(family: str) -> None:
    from transformers.modeling_utils import AttentionInterface

    model, tiny = build(family), TINY[family]
    before = (
        implementations(model),
        [sorted(vars(m)) for m in model.modules()],
        sorted(AttentionInterface._global_mapping),
    )

    def fail(call: AttentionCall) -> None:
        raise KeyError(call.info.name)

    with pytest.raises(KeyError), captured(model, fail, inputs_too=True):
        model(**tiny.inputs("left"))
    after = (
        implementations(model),
        [sorted(vars(m)) for m in model.modules()],
        sorted(AttentionInterface._global_mapping),
    )
    assert after == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert len(hear(model, tiny.inputs("left"))) == len(attention_modules(model))


def test_an_error_of_the_model_leaves_it_as_it_was() -> None:
    model = build("bert")
    before = implementations(model)
    with pytest.raises(IndexError), captured(model, lambda call: None):
        model(input_ids=torch.tensor([[1000]]))
    assert implementations(model) == before


def test_a_model_in_training_keeps_its_mode_and_its_random_numbers() -> None:
    model = build("bert").train()
    inputs = texts("right")
    torch.manual_seed(5)
    expected = model(**inputs)[0]
    torch.manual_seed(5)
    attention_modules(model)
    with captured(model, lambda call: None):
        found = model(**inputs)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(module.training for module in model.modules())
    assert found.requires_grad


def test_calls_are_detached() -> None:
    model = build("bert")
    with captured(model, lambda call: calls.append(call), inputs_too=True):
        calls: list[AttentionCall] = []
        model(**texts("left"))
    tensors = [part for call in calls for part in (call.q, call.k, call.query_input, call.key_input)]
    assert not any(part.requires_grad for part in tensors if part is not None)


def test_only_the_modules_asked_for() -> None:
    model = build("t5")
    wanted = [info.name for info in attention_modules(model) if info.kind == "cross"]
    calls = hear(model, pairs("left"), modules=wanted)
    assert [call.info.name for call in calls] == wanted


def test_unknown_module() -> None:
    with pytest.raises(InvalidInputError, match=r"captured: modules must be names .* got 'layer 1'"):
        hear(build("bert"), texts("left"), modules=["layer 1"])


@pytest.mark.parametrize("family", ["llama", "gpt_neo", "deberta-v2", "bloom"])
def test_two_at_once_hear_the_same(family: str) -> None:
    model, inputs = build(family), texts("left")
    outer: list[AttentionCall] = []
    with torch.no_grad(), captured(model, outer.append):
        inner = hear(model, inputs)
        model(**inputs)
    assert [call.info for call in outer[len(inner) :]] == [call.info for call in inner], "the outer one went deaf"
    del outer[len(inner) :]
    assert [call.info for call in outer] == [call.info for call in inner]
    for one, other in zip(outer, inner, strict=True):
        torch.testing.assert_close(one.weights(), other.weights(), rtol=0, atol=0)


def test_threads_take_turns() -> None:
    model, inputs = build("bert"), texts("left")
    before = implementations(model)
    infos = attention_modules(model)
    with ThreadPoolExecutor(4) as pool:
        heard = list(pool.map(lambda _: [call.info for call in hear(model, inputs)], range(24)))
    assert heard == [infos] * 24
    assert implementations(model) == before


def test_another_model_is_not_heard() -> None:
    model, other = build("bert"), build("bert")
    calls: list[AttentionCall] = []
    with torch.no_grad(), captured(model, calls.append):
        other(**texts("left"))
    assert calls == []


def test_inputs_are_those_of_the_projections() -> None:
    model = build("gpt2")
    normed: list[Tensor] = []
    for block in model.h:
        block.ln_1.register_forward_hook(lambda _, __, output: normed.append(output))
    calls = hear(model, texts("left"), inputs_too=True)
    normed = normed[-2:]
    for call, hidden in zip(calls, normed, strict=True):
        torch.testing.assert_close(call.query_input, hidden, rtol=0, atol=0)
        assert call.key_input is call.query_input


def test_cross_attention_has_the_inputs_of_both_sides() -> None:
    calls = hear(build("bart"), pairs("left"), inputs_too=True)
    cross = next(call for call in calls if call.info.kind == "cross")
    assert cross.query_input is not None
    assert cross.query_input.shape == (2, 5, 32)
    assert cross.key_input is not None
    assert cross.key_input.shape == (2, 7, 32)


def test_without_padding_the_future_is_still_forbidden() -> None:
    # transformers leaves such masks out and tells sdpa that attention is causal.
    call = hear(build("llama"), {"input_ids": texts("left")["input_ids"]})[0]
    assert not bool(call.weights().triu(1).any())
    torch.testing.assert_close(call.weights().sum(-1), torch.ones(2, 4, 7))


def test_sinks_take_part_of_the_weight() -> None:
    call = hear(build("gpt_oss"), texts("right"))[0]
    assert call.sinks is not None
    assert call.sinks.shape == (4,)
    assert float(call.weights().sum(-1).max()) < 1


def test_relative_bias_is_an_offset_and_padding_is_not() -> None:
    call = hear(build("t5"), pairs("left"))[0]
    assert call.offsets is not None
    assert call.mask is not None
    assert call.offsets.shape[-2:] == (7, 7)
    assert float(call.offsets.abs().max()) < 100
    assert not bool(call.mask[1, 0, :, :3].any())


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom", "falcon", "gptj"])
def test_generation_is_heard_step_by_step(family: str) -> None:
    names = {"gpt2": "GPT2LMHeadModel", "gptj": "GPTJForCausalLM", "llama": "LlamaForCausalLM"}
    name = names.get(family, f"{family.capitalize()}ForCausalLM")
    model: Any = replace(TINY[family], model=name).build()
    prompt = texts("left")
    options: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**prompt, **options)
    calls: list[AttentionCall] = []
    with captured(model, calls.append):
        found = model.generate(**prompt, **options)
    assert torch.equal(found, expected)
    assert [call.query_length for call in calls] == [7, 7, 1, 1, 1, 1]
    assert [call.key_length for call in calls] == [7, 7, 8, 8, 9, 9]
    # The whole text at once gives the same rows.
    mask = torch.cat([prompt["attention_mask"], torch.ones(2, 2, dtype=torch.int64)], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    places = {} if family == "bloom" else {"position_ids": positions}
    whole = hear(model, {"input_ids": found[:, :9], "attention_mask": mask, **places})
    for call in calls:
        rows = slice(call.key_length - call.query_length, call.key_length)
        again = next(other for other in whole if other.info == call.info).weights(rows=rows)[..., : call.key_length]
        torch.testing.assert_close(call.weights(), again, rtol=0, atol=1e-5)


def test_sixteen_bits() -> None:
    model, inputs = build("llama").to(torch.bfloat16), texts("left")
    with torch.no_grad():
        expected = model(**inputs)[0]
    with torch.no_grad(), captured(model, lambda call: None):
        found = model(**inputs)[0]
    assert torch.equal(found, expected)
    assert hear(model, inputs)[0].logits().dtype == torch.float32


def test_models_without_readable_attention() -> None:
    with pytest.raises(UnsupportedError, match=r"no attention .* from_attentions"):
        attention_modules(nn.Linear(2, 2))
    longformer = transformers.LongformerModel(transformers.LongformerConfig(**SMALL, attention_window=4))
    with pytest.raises(UnsupportedError, match="longformer, whose attention looks at windows"):
        attention_modules(longformer)
    mamba = transformers.MambaModel(transformers.MambaConfig(vocab_size=99, hidden_size=32, num_hidden_layers=1))
    with pytest.raises(UnsupportedError, match="mamba, which has no attention"):
        attention_modules(mamba)
    sides = sizes(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)
    with pytest.raises(UnsupportedError, match="swin, whose attention cuts its inputs into windows"):
        attention_modules(transformers.SwinModel(transformers.SwinConfig(**sides)))


def test_what_is_not_a_model() -> None:
    with pytest.raises(InvalidInputError, match=r"model must be a torch\.nn\.Module, got str"):
        attention_modules("bert")  # type: ignore[arg-type]


class Demanding(nn.Module):
    """A model that takes something nobody can guess."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build("bert")
        self.config = self.inner.config

    def forward(self, *, secret: Tensor) -> Any:
        return self.inner(input_ids=secret)


def test_a_model_with_inputs_of_its_own() -> None:
    model = Demanding()
    with pytest.raises(
        UnsupportedError, match=r"must run on no inputs, got TypeError .*attention_modules\(model, inputs\)"
    ):
        attention_modules(model)
    secret = torch.tensor([[5, 6, 7]])
    infos = attention_modules(model, {"secret": secret})
    assert [info.name for info in infos] == [f"inner.encoder.layer.{layer}.attention.self" for layer in range(2)]
    assert torch.equal(working_inputs(model)["secret"], secret)
    assert len(hear(model, {"secret": secret})) == 2


def test_a_model_that_was_changed_is_looked_at_anew() -> None:
    model = build("bert")
    assert len(attention_modules(model)) == 2
    del model.encoder.layer[1]
    assert len(attention_modules(model)) == 1


def test_masks_come_apart_exactly() -> None:
    lowest = torch.finfo(torch.float32).min
    additive = torch.tensor([[[[0.0, lowest, -torch.inf], [1.5, lowest + 3.0, -100.0]]]])
    allowed, offsets = apart(additive)
    assert allowed is not None
    assert offsets is not None
    assert allowed.tolist() == [[[[True, False, False], [True, False, True]]]]
    assert offsets.tolist() == [[[[0.0, 0.0, 0.0], [1.5, 0.0, -100.0]]]]
    assert apart(torch.zeros(1, 1, 2, 2)) == (None, None)
    boolean = torch.tensor([[True, False]])
    assert apart(boolean)[0] is boolean
    assert apart(torch.tensor([[1, 0]]))[0].tolist() == [[True, False]]  # type: ignore[union-attr]


def test_both_towers_of_a_model_are_heard() -> None:
    text = {**SMALL, **sizes(max_position_embeddings=16, bos_token_id=1, eos_token_id=2, pad_token_id=0)}
    picture = {name: value for name, value in SMALL.items() if name != "vocab_size"} | sizes(image_size=8, patch_size=4)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=picture))
    kinds = sorted(info.kind for info in attention_modules(model))
    assert kinds == ["decoder", "decoder", "encoder", "encoder"]


@pytest.mark.parametrize("family", sorted(REASONS))
def test_families_with_a_reason(family: str) -> None:
    model = build("bert")
    model.config.model_type = family
    with pytest.raises(UnsupportedError, match=re.escape(f"got {family}, {REASONS[family]}. Hint: ")):
        attention_modules(model)
