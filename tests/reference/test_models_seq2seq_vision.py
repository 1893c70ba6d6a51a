"""BART, T5, ViT and DINOv2 against transformers: tiny random models of all options, read, run, written, read back."""

from __future__ import annotations

import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from attsvm.errors import InvalidInputError, UnsupportedError
from attsvm.models.pretrained import FAMILY_HOMES, family_of, from_pretrained, save_pretrained

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float32", "float64"])


@pytest.fixture(autouse=True)
def _double_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers' RMS norm take the variance in the dtype of its input; it takes float32, whatever that is."""

    def forward(self: Any, x: Tensor) -> Tensor:
        output: Tensor = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))
        return output

    from transformers.models.t5 import modeling_t5

    monkeypatch.setattr(modeling_t5.T5LayerNorm, "forward", forward)


def random(model: Any) -> Any:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            # Wide enough that attention is far from uniform, narrow enough that logits stay of order one.
            parameter.normal_(std=1.2 / parameter.shape[-1] ** 0.5, generator=generator)
    return model.eval()


def bart(activation: str = "gelu", scaled: bool = False, uneven: bool = True) -> Any:
    torch.manual_seed(0)
    sizes = {"decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 10} if uneven else {}
    config = transformers.BartConfig(
        **{
            "vocab_size": 19,
            "d_model": 8,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 12,
            "decoder_ffn_dim": 12,
            "max_position_embeddings": 16,
            "activation_function": activation,
            "scale_embedding": scaled,
            **sizes,
        }
    )
    model = random(transformers.BartForConditionalGeneration(config))
    model.final_logits_bias.copy_(torch.linspace(-1, 1, 19))
    return model


def t5(mlp: str = "relu", head: str = "scaled", uneven: bool = True) -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=19,
        d_model=8,
        d_kv=3 if uneven else 4,
        d_ff=12,
        num_layers=2,
        num_decoder_layers=3 if uneven else 2,
        num_heads=2,
        relative_attention_num_buckets=8 if uneven else 32,
        relative_attention_max_distance=6 if uneven else 128,
        feed_forward_proj=mlp,
        tie_word_embeddings=head == "scaled",
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config)
    if head == "own":
        # As in the published v1.1 files; transformers 5 ties a new model whatever its config says.
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return random(model)


def vit(head: str = "pooler", bias: bool = True, activation: str = "gelu", size: Any = 8) -> Any:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        image_size=size,
        patch_size=4,
        qkv_bias=bias,
        hidden_act=activation,
        num_labels=5,
    )
    if head == "classes":
        return random(transformers.ViTForImageClassification(config))
    return random(transformers.ViTModel(config, add_pooling_layer=head == "pooler"))


def dinov2(head: str = "none", gated: bool = False, bias: bool = True, mask_token: bool = True) -> Any:
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        mlp_ratio=3,
        image_size=8,
        patch_size=2,
        num_channels=1,
        qkv_bias=bias,
        use_swiglu_ffn=gated,
        use_mask_token=mask_token,
        num_labels=2,
    )
    kind = transformers.Dinov2ForImageClassification if head == "classes" else transformers.Dinov2Model
    return random(kind(config))


def cases(make: Any, *options: tuple[Any, ...]) -> list[Any]:
    """All combinations of options, each with a readable id."""
    name = make.__name__
    return [pytest.param(partial(make, *values), id=f"{name}-{values}") for values in product(*options)]


EITHER = (False, True)
BARTS = cases(bart, ("gelu", "relu", "gelu_new"), EITHER, EITHER)
T5S = cases(t5, ("relu", "gelu", "gated-gelu", "gated-silu"), ("scaled", "plain", "own"), EITHER)
VITS = cases(vit, ("pooler", "none", "classes"), EITHER, ("gelu", "relu"), (8, [8, 12]))
DINOS = cases(dinov2, ("none", "classes"), EITHER, EITHER, EITHER)
PAIRS = pytest.mark.parametrize("make", BARTS + T5S)
IMAGES = pytest.mark.parametrize("make", VITS + DINOS)
ONE_EACH = pytest.mark.parametrize(
    "make",
    [
        *cases(bart),
        *cases(t5),
        *cases(t5, ("gated-gelu",), ("own",)),
        *cases(vit),
        *cases(dinov2),
        *cases(dinov2, ("classes",), (True,)),
    ],
)


def read(theirs: Any, folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Their model and ours, of the same checkpoint, in a dtype."""
    theirs.save_pretrained(folder)
    ours = from_pretrained(folder)
    # float64 needs the fused kernel there: their plain attention takes the softmax in float32.
    theirs.set_attn_implementation("eager" if dtype == torch.float32 else "sdpa")
    return theirs.to(dtype), ours.to(dtype)


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, 19, shape, generator=torch.Generator().manual_seed(seed))


def images(ours: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (2, ours.config.n_channels, *ours.config.image_shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


def their_output(theirs: Any, ours: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits, or hidden states where there is no head, of a fixed input."""
    inputs = {"input_ids": ids(2, 9), "decoder_input_ids": ids(2, 8)}
    if hasattr(ours, "patches"):
        inputs = {"pixel_values": images(ours, dtype)}
    output = theirs(**inputs)
    result: Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return result


def our_output(ours: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    output = ours(images(ours, dtype)) if hasattr(ours, "patches") else ours(ids(2, 9), ids(2, 8))
    result: Tensor = output.hidden if output.logits is None else output.logits
    return result


# -------------------------------------------------------------------------------------------------------- same numbers


@DTYPES
@PAIRS
@torch.no_grad()
def test_pairs_give_the_same_logits(make: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs, ours = read(make(), tmp_path, dtype)
    source, target = ids(3, 12), ids(3, 10)
    real = (torch.arange(12) < torch.tensor([[12], [7], [1]])).long()
    expected = theirs(input_ids=source, attention_mask=real, decoder_input_ids=target)
    found = ours(source, target, attention_mask=real)
    close(found.logits, expected.logits, TOLERANCE[dtype])
    encoded = ours.encode(source, real)
    close(encoded[real.bool()], expected.encoder_last_hidden_state[real.bool()], TOLERANCE[dtype])
    cache = ours.new_cache()
    steps = [ours(source, target[:, :1], attention_mask=real, cache=cache)]
    steps += [ours(None, token, cache=cache) for token in target[:, 1:].split(1, dim=1)]
    close(torch.cat([step.logits for step in steps], 1), expected.logits, TOLERANCE[dtype])


@PAIRS
@torch.no_grad()
def test_pairs_give_the_same_patterns(make: Any, tmp_path: Path) -> None:
    theirs, ours = read(make(), tmp_path)
    source, target = ids(2, 7), ids(2, 6)
    real = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    expected = theirs(
        input_ids=source, attention_mask=real, decoder_input_ids=target, output_attentions=True, use_cache=False
    )
    found = ours(source, target, attention_mask=real, weights=True).weights
    kinds = {"encoder": "encoder_attentions", "decoder": "decoder_attentions", "cross": "cross_attentions"}
    for kind, name in kinds.items():
        patterns = getattr(expected, name)
        assert len(patterns) == len(found[kind]) > 0
        for one, other in zip(found[kind], patterns):
            # Padding asks too, but in BART it has places of its own there; nothing reads what it gets.
            rows = real.bool()[:, None, :, None] if kind == "encoder" else torch.tensor(True)
            close(one * rows, other * rows, 1e-5)


@PAIRS
@torch.no_grad()
def test_a_decoder_mask_does_the_same(make: Any, tmp_path: Path) -> None:
    theirs, ours = read(make(), tmp_path)
    source, target, real = ids(2, 5), ids(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    expected = theirs(input_ids=source, decoder_input_ids=target, decoder_attention_mask=real).logits
    found = ours(source, target, decoder_mask=real).logits
    close(found[real.bool()], expected[real.bool()], 1e-5)


@DTYPES
@IMAGES
@torch.no_grad()
def test_images_give_the_same_states(make: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs, ours = read(make(), tmp_path, dtype)
    x = images(ours, dtype)
    expected, found = theirs(pixel_values=x, output_hidden_states=True), ours(x)
    if ours.head is not None:
        close(found.logits, expected.logits, TOLERANCE[dtype])
        return
    close(found.hidden, expected.last_hidden_state, TOLERANCE[dtype])
    if expected.pooler_output is not None:
        close(found.pooled, expected.pooler_output, TOLERANCE[dtype])


@IMAGES
@torch.no_grad()
def test_images_give_the_same_patterns(make: Any, tmp_path: Path) -> None:
    theirs, ours = read(make(), tmp_path)
    x = images(ours)
    expected, found = (
        theirs(pixel_values=x, output_attentions=True).attentions,
        ours(x, weights=True).weights["encoder"],
    )
    assert len(expected) == len(found) == 2
    for one, other in zip(found, expected):
        close(one, other, 1e-5)


@torch.no_grad()
def test_masked_patches_do_the_same(tmp_path: Path) -> None:
    theirs, ours = read(dinov2(), tmp_path)
    x, masked = images(ours), torch.rand(2, 16, generator=torch.Generator().manual_seed(3)) < 0.4
    expected = theirs(pixel_values=x, bool_masked_pos=masked).last_hidden_state
    close(ours(x, masked=masked).hidden, expected, 1e-5)


@pytest.mark.parametrize("make", [*BARTS, *T5S, *VITS, *DINOS])
def test_gradients_are_the_same(make: Any, tmp_path: Path) -> None:
    theirs, ours = read(make(), tmp_path)
    for output in (their_output(theirs, ours), our_output(ours)):
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    family, config = family_of(ours), ours.config
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    table = {family.full_name(weight.theirs, config): weight for weight in family.weights(config)}
    compared = set()
    # Their modules are not named as their files are, so gradients travel through a file of their own.
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    for name, expected in load_file(tmp_path / "gradients" / "model.safetensors").items():
        weight = table[name]
        if all(part in gradients for part in weight.ours):
            close(weight.join(gradients), expected, 1e-4)
            compared |= set(weight.ours)
    assert compared == set(gradients)
    # What nothing reads: the pooler in front of hidden states, the token of patches that are not masked.
    unread = {name for name, _ in ours.named_parameters()} - compared
    assert unread <= {"pooler.weight", "pooler.bias", "mask_token"}


# -------------------------------------------------------------------------------------------------- read, written, read


@ONE_EACH
@torch.no_grad()
def test_files_in_float64_are_read_in_float64(make: Any, tmp_path: Path) -> None:
    """Constants too: the bias of BART's logits is no parameter."""
    theirs = make().double()
    theirs.save_pretrained(tmp_path)
    theirs.set_attn_implementation("sdpa")
    ours = from_pretrained(tmp_path)
    assert {tensor.dtype for tensor in ours.state_dict().values()} == {torch.float64}
    close(our_output(ours, torch.float64), their_output(theirs, ours, torch.float64), 1e-10)


@pytest.mark.parametrize("make", [*BARTS, *T5S, *VITS, *DINOS])
@torch.no_grad()
def test_written_models_are_read_by_transformers(make: Any, tmp_path: Path) -> None:
    theirs, ours = read(make(), tmp_path / "theirs")
    save_pretrained(ours, tmp_path / "ours")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = from_pretrained(tmp_path / "ours")
    assert again.config == ours.config
    back, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    # ViTModel makes a pooler whether there are weights for it or not.
    without = isinstance(theirs, transformers.ViTModel) and theirs.pooler is None
    assert report["missing_keys"] == ({"pooler.dense.weight", "pooler.dense.bias"} if without else set())
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    back.set_attn_implementation("eager")
    close(their_output(back.eval(), ours), their_output(theirs, ours), 0.0)


@pytest.mark.parametrize("make", [*BARTS, *T5S, *VITS, *DINOS])
def test_each_weight_is_used_once(make: Any, tmp_path: Path) -> None:
    theirs, ours = read(make(), tmp_path)
    family = family_of(ours)
    used = [name for weight in family.weights(ours.config) for name in weight.ours]
    assert sorted(used) == sorted(ours.state_dict())
    assert ours.n_parameters == ours.config.n_parameters == sum(p.numel() for p in theirs.parameters())


@ONE_EACH
@pytest.mark.parametrize("damage", ["missing", "surplus", "shape", "truncated", "depth"])
def test_damaged_checkpoints_are_refused(make: Any, damage: str, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(
        name for name in tensors if name.endswith("k.weight") or "k_proj.weight" in name or "key.weight" in name
    )
    if damage == "missing":
        del tensors[name]
    elif damage == "surplus":
        tensors["extra.weight"] = torch.ones(2)
    elif damage == "shape":
        tensors[name] = tensors[name][:-1].contiguous()
    elif damage == "depth":
        content = json.loads((tmp_path / "config.json").read_text())
        content |= {key: 10**9 for key in content if key.endswith("layers") or key == "num_decoder_layers"}
        (tmp_path / "config.json").write_text(json.dumps(content))
    save_file(tensors, file, metadata={"format": "pt"})
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InvalidInputError, match="from_pretrained"):
        from_pretrained(tmp_path)


@torch.no_grad()
def test_copies_of_the_embedding_are_read_if_they_are_copies(tmp_path: Path) -> None:
    for number, theirs in enumerate((bart(), t5())):
        folder = tmp_path / str(number)
        theirs.save_pretrained(folder)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        prefix = "model." if number == 0 else ""
        for name in (f"{prefix}encoder.embed_tokens.weight", f"{prefix}decoder.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[f"{prefix}shared.weight"].clone()
        save_file(tensors, file, metadata={"format": "pt"})
        ours = from_pretrained(folder)
        assert ours.head is None
        close(our_output(ours), their_output(theirs, ours), 1e-5)
        tensors["lm_head.weight"][0, 0] += 1
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(InvalidInputError, match=r"1 too many: lm_head\.weight"):
            from_pretrained(folder)


def test_other_kinds_of_models_are_refused(tmp_path: Path) -> None:
    for make, change in (
        (t5, {"feed_forward_proj": "gated-mish"}),
        (bart, {"activation_function": "mish"}),
        (vit, {"pooler_act": "relu"}),
    ):
        make().save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        with pytest.raises(UnsupportedError, match=next(iter(change))):
            from_pretrained(tmp_path)


def test_all_four_families_have_a_home() -> None:
    assert {"bart", "t5", "vit", "dinov2"} <= FAMILY_HOMES.keys()
