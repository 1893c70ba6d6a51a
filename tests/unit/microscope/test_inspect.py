"""From a model and texts to the atlas: it says what the model does, whatever the order, batches or interruptions."""

from __future__ import annotations

import dataclasses
import functools
import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attsvm.errors import InvalidInputError, RecordError
from attsvm.microscope import HeadAtlas, inspect, workers
from attsvm.microscope.calls import ModuleInfo
from attsvm.microscope.corpus import read_corpus
from attsvm.microscope.inspect import MOST_ROWS, _affordable, _fingerprint
from attsvm.microscope.loading import load
from attsvm.records import read_json, write_json
from unit.microscope.tiny_tokenizers import HOSTILE, SENTENCES, tiny
from unit.microscope.tiny_tokenizers import trained as train

pytest.importorskip("transformers")

# Training a tokenizer twice may number its tokens in two ways.
trained = functools.cache(train)

KINDS = {"bert": "bert", "gpt2": "gpt2", "llama": "llama", "t5": "t5", "bart": "t5"}
SMALL = {"max_queries": 40, "batch_size": 2, "n_shown": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TEXTS = [*SENTENCES, "A lazy fox and a quick dog jump.", "Brown dogs, brown foxes."]


def look(family: str, texts: Any = TEXTS, **settings: Any) -> HeadAtlas:
    return inspect(tiny(family), trained(KINDS[family]), texts, **{**SMALL, **settings})


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_the_atlas_says_what_eager_attention_does(family: str) -> None:
    atlas = look(family)
    model, tokenizer = tiny(family), trained(KINDS[family])
    model.set_attn_implementation("eager")
    tops: list[list[torch.Tensor]] = [[] for _ in atlas.labels]
    with torch.no_grad():
        for text in TEXTS:
            out = model(**tokenizer(text, return_tensors="pt"), output_attentions=True)
            for number, head in enumerate(atlas):
                tops[number].append(out.attentions[head.layer][0, head.head].max(-1).values)
    for head, top in zip(atlas, tops, strict=True):
        assert head["top_probability"] == pytest.approx(float(torch.cat(top).mean()), abs=1e-6)
        assert head.values["top_probability"]["n"] == len(torch.cat(top))  # type: ignore[index]
    assert atlas.record["check"]["compared"]
    assert atlas.record["check"]["max_difference"] < 1e-5
    assert atlas.labels[:5] == ("L0.H0", "L0.H1", "L0.H2", "L0.H3", "L1.H0")


def test_the_texts_shown_are_drawn_from_the_models_weights() -> None:
    atlas = look("gpt2")
    model, tokenizer = tiny("gpt2"), trained("gpt2")
    model.set_attn_implementation("eager")
    for place, shown in enumerate(atlas.record["shown"]):
        with torch.no_grad():
            out = model(**tokenizer(shown["text"], return_tensors="pt"), output_attentions=True)
        for layer in (0, 1):
            pattern = atlas.arrays[f"shown.{place}.{layer}.pattern"]
            wanted = out.attentions[layer][0].numpy()
            assert pattern.shape == wanted.shape
            np.testing.assert_allclose((pattern / 255.0) ** 2, wanted, atol=2 / 255)
            chosen = atlas.arrays[f"shown.{place}.{layer}.selected"]
            np.testing.assert_array_equal(chosen, wanted.argmax(-1))
            top = np.sort(wanted, -1)
            # A margin in logits is the logarithm of a ratio of weights.
            margin = atlas.arrays[f"shown.{place}.{layer}.margin"]
            np.testing.assert_allclose(margin[:, 1:], np.log(top[:, 1:, -1] / top[:, 1:, -2]), atol=1e-4)
            assert np.isinf(margin[:, 0]).all()


def test_positions_decide_the_space() -> None:
    atlas = look("bert")
    assert atlas.record["primary"]["space"] == "residual"
    assert [(one["space"], one["norm"]) for one in atlas["L0.H0"].solutions] == [
        ("residual", "fro"),
        ("score", "fro"),
        ("score", "nuc"),
    ]
    assert atlas["L0.H0"].matrices["residual.fro"].shape == (33, 33)
    rotary = look("llama")
    assert rotary.record["primary"]["space"] == "score"
    assert "rotary" in rotary.record["primary"]["why"]
    assert rotary["L1.H3"].kv_head == 1
    assert rotary["L1.H3"].matrices["score.fro"].shape == (8, 8)
    with pytest.raises(InvalidInputError, match=r"space must be 'score' or 'auto' for this model.*rotary"):
        look("llama", space="residual")
    both = look("bert", space="residual", heads=("L1.H2",))
    assert [(one["space"], one["norm"]) for one in both["L1.H2"].solutions] == [
        ("residual", "fro"),
        ("residual", "nuc"),
    ]


def test_three_kinds_of_heads_in_one_atlas() -> None:
    atlas = look("t5", [("A quick fox.", "Dogs and foxes."), ("The lazy dog.", "Foxes."), (TEXTS[0], TEXTS[1])])
    kinds = {head.kind for head in atlas}
    assert kinds == {"encoder", "decoder", "cross"}
    assert len(atlas) == 24
    assert atlas["cross.L0.H2"].kind == "cross"
    with pytest.raises(InvalidInputError, match=r"encoder\.L0\.H2 or decoder\.L0\.H2 or cross\.L0\.H2; got L0\.H2"):
        atlas["L0.H2"]
    shown = atlas.record["shown"][0]
    module = next(one for one in atlas.record["modules"] if one["kind"] == "cross")
    shape = atlas.arrays[f"shown.0.{module['index']}.pattern"].shape
    assert shape == (4, len(shown["target"]["tokens"]), len(shown["source"]["tokens"]))
    similarity = atlas.similarity
    assert similarity is not None
    np.testing.assert_allclose(np.diag(similarity), 1.0)
    crossing = [head.kind == "cross" for head in atlas]
    assert np.isnan(similarity[np.ix_(crossing, ~np.array(crossing))]).all()


def numbers(atlas: HeadAtlas) -> dict[str, float]:
    found: dict[str, float] = {}
    for head in atlas:
        for key, value in head.values.items():
            found |= {f"{head.label}.{key}.{end}": x for end, x in (value or {}).items() if x is not None}
        for one in head.solutions:
            name = f"{head.label}.{one['space']}.{one['norm']}"
            left_out = ("seconds", "gap")
            found |= {f"{name}.{k}": v for k, v in one.items() if isinstance(v, (int, float)) and k not in left_out}
    return found


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_order_batches_and_repetition_change_nothing(family: str) -> None:
    plain = numbers(look(family))
    for texts, size in ((TEXTS, 1), (TEXTS[::-1], 5), (TEXTS, 16)):
        other = numbers(look(family, texts, batch_size=size))
        assert other.keys() == plain.keys()
        for name, value in plain.items():
            assert other[name] == pytest.approx(value, abs=1e-6, rel=1e-6), name


class StoppedError(Exception):
    pass


def stopping(task: str, at: float) -> Callable[[str, float, float, str], None]:
    def tell(now: str, done: float, total: float, note: str) -> None:
        if now == task and done >= at:
            raise StoppedError

    return tell


@pytest.mark.parametrize(("task", "at"), [("measure", 2), ("sample", 2), ("solve", 3)])
def test_an_interrupted_run_goes_on(task: str, at: int, tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        look("bert", output_dir=tmp_path / "run", progress=stopping(task, at))
    assert not (tmp_path / "run" / "result.json").exists()
    solved = []
    atlas = look("bert", output_dir=tmp_path / "run", progress=lambda now, *rest: solved.append((now, *rest)))
    assert next(done for now, done, _, _ in solved if now == "solve") == (at if task == "solve" else 0)
    assert numbers(atlas) == numbers(look("bert"))
    assert not (tmp_path / "run" / "checkpoint").exists()
    with pytest.raises(InvalidInputError, match="holds a finished run"):
        look("bert", output_dir=tmp_path / "run")


def test_other_texts_or_weights_are_another_run(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        look("bert", output_dir=tmp_path / "run", progress=stopping("solve", 1))
    with pytest.raises(InvalidInputError, match="unfinished run with other settings, model or texts"):
        look("bert", TEXTS[:3], output_dir=tmp_path / "run")
    with pytest.raises(InvalidInputError, match="unfinished run with other settings, model or texts"):
        look("bert", output_dir=tmp_path / "run", null=False)
    model = tiny("bert")
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight[0, 0] += 1.0
    with pytest.raises(InvalidInputError, match="unfinished run with other settings, model or texts"):
        inspect(model, trained("bert"), TEXTS, **SMALL, output_dir=tmp_path / "run")


def test_what_another_version_left_is_another_run(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        look("bert", output_dir=tmp_path / "run", progress=stopping("solve", 1))
    config = tmp_path / "run" / "config.json"
    there = read_json(config)
    write_json(config, there | {"versions": there["versions"] | {"attsvm": "0.0.0"}})
    with pytest.raises(InvalidInputError, match="or of another version of attsvm"):
        look("bert", output_dir=tmp_path / "run")
    write_json(config, there)
    assert numbers(look("bert", output_dir=tmp_path / "run")) == numbers(look("bert"))


def test_a_run_is_known_again_whatever_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(tiny("bert"), trained("bert"))
    with torch.no_grad():  # numbers of many sizes, whose sum depends on the order
        weight = loaded.model.embeddings.word_embeddings.weight
        weight.copy_(weight * torch.logspace(-6, 6, weight.shape[1]))
    corpus = read_corpus(loaded, TEXTS)
    known = _fingerprint(loaded, corpus)
    summed = torch.Tensor.sum

    def backwards(values: torch.Tensor, *args: Any, **given: Any) -> torch.Tensor:
        return summed(values.flatten().flip(0)[: values.numel() // 3], *args, **given) + summed(
            values.flatten().flip(0)[values.numel() // 3 :], *args, **given
        )

    monkeypatch.setattr(torch.Tensor, "sum", backwards)
    assert _fingerprint(loaded, corpus) == known


def test_a_process_whose_parent_is_gone_claims_nothing(tmp_path: Path) -> None:
    info = ModuleInfo(
        name="attn",
        kind="encoder",
        layer=0,
        n_heads=1,
        n_kv_heads=1,
        d_head=2,
        query_side="source",
        key_side="source",
        tier="interface",
        prefixed=False,
    )
    jobs = [{"index": 0, "head": 0, "wanted": []}]
    plan = {"samples": str(tmp_path), "shown": [], "settings": {}, "jobs": jobs, "scales": {"0": None}}
    write_json(tmp_path / "jobs.json", {**plan, "modules": {"0": dataclasses.asdict(info)}})
    (tmp_path / "claims").mkdir()
    workers.work(tmp_path, 0, 1, -1)
    assert not list((tmp_path / "claims").iterdir()), "the processes of the next try would leave that head out"


def test_repeated_texts_leave_the_number_of_queries() -> None:
    loaded = load(tiny("gpt2", n_ctx=512), trained("gpt2"))
    long, short = " ".join(SENTENCES * 6), "A fox."
    plain, repeated = (read_corpus(loaded, [long, short, *[short] * extra]) for extra in (0, 9))
    most, notes = _affordable(plain, MOST_ROWS)
    assert 1 < most < MOST_ROWS
    assert _affordable(repeated, MOST_ROWS) == (most, notes)


def tiny_llama_like(name: str, **given: Any) -> Any:
    import transformers as hf

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    sizes |= {"intermediate_size": 48, "vocab_size": 400, "max_position_embeddings": 64}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(hf, f"{name}Config")(**sizes, **given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return getattr(hf, f"{name}Model")(config).eval()


def test_one_kind_of_solution_stands_for_the_heads_of_all_layers() -> None:
    model = tiny_llama_like("SmolLM3", no_rope_layers=[0, 1])
    atlas = inspect(model, trained("llama"), TEXTS, **SMALL)
    assert [module["residual"] is None for module in atlas.record["modules"]] == [True, False]
    assert atlas.record["primary"]["space"] == "score"
    assert [one["space"] for one in atlas["L0.H0"].solutions] == ["score", "score", "residual"]
    assert {one["space"] for one in atlas["L1.H0"].solutions} == {"score"}


def test_margins_that_are_shown_are_those_that_are_measured_where_there_is_a_sink() -> None:
    model = tiny_llama_like("GptOss", head_dim=8, num_local_experts=2, num_experts_per_tok=1, rope_parameters=ROPE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.copy_(torch.tensor([-3.0, 0.0, 0.01, 3.0]))
    atlas = inspect(model, trained("llama"), TEXTS[:3], **{**SMALL, "n_shown": 3, "max_queries": 0})
    for head in atlas:
        shown = [f"shown.{place}.{head.layer}" for place in range(3)]
        margins = np.concatenate([atlas.arrays[f"{name}.margin"][head.head] for name in shown])
        assert np.isfinite(margins).all()
        assert head["margin"] == pytest.approx(margins.mean(), abs=1e-5)
    chosen = atlas.arrays["shown.0.0.selected"]
    assert (chosen[3] == -1).all(), "a sink that outweighs all keys"
    assert (chosen[0] >= 0).all(), "a sink that no query heeds"


def test_offsets_between_equal_tokens_can_be_met() -> None:
    # At the first layer of T5 a token that stands twice is told apart by its offset alone.
    again = [(f"{text} {text}", text) for text in TEXTS]
    heads = tuple(f"encoder.L0.H{head}" for head in range(4))
    atlas = look("t5", again, heads=heads, null=False)
    assert {one["status"] for head in atlas for one in head.solutions} == {"OPTIMAL"}


def test_several_processes_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = look("bert")
    monkeypatch.setattr(workers, "FEW", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert numbers(look("bert", output_dir=tmp_path / "run")) == numbers(alone)


def test_a_part_of_the_model(tmp_path: Path) -> None:
    atlas = look("bert", layers=(1,))
    assert atlas.labels == ("L1.H0", "L1.H1", "L1.H2", "L1.H3")
    two = look("bert", heads=("L0.H3", "L1.H1"))
    assert two.labels == ("L0.H3", "L1.H1")
    assert two.arrays["shown.0.0.pattern"].shape[0] == 1
    whole = look("bert")
    np.testing.assert_array_equal(two.arrays["shown.0.1.pattern"][0], whole.arrays["shown.0.1.pattern"][1])
    assert two["L1.H1"].values == whole["L1.H1"].values
    plain = look("bert", max_queries=0)
    assert plain["L0.H0"].solutions == []
    assert plain.record["primary"] is None


def test_special_tokens_can_be_dropped() -> None:
    kept, dropped = look("bert"), look("bert", special="drop")
    assert dropped["L0.H0"]["separator_mass"] == pytest.approx(0.0, abs=1e-12)
    assert kept["L0.H0"]["separator_mass"] > 0.01
    n = {atlas["L0.H0"].values["entropy"]["n"] for atlas in (kept, dropped)}  # type: ignore[index]
    assert len(n) == 2


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_pass_through(text: str) -> None:
    atlas = look("gpt2", [text, "A quick fox."], max_queries=10)
    page = atlas.to_html()
    assert "<script>alert" not in page
    assert "onerror=alert" not in page.replace("onerror=alert(1)\\u003e", "")


def test_one_token_is_a_text() -> None:
    atlas = look("gpt2", ["A"])
    assert atlas["L0.H0"]["top_probability"] == pytest.approx(1.0)
    assert atlas["L0.H0"].values["margin"] is None
    assert atlas["L0.H0"].solutions == []
    assert "L0.H0" in atlas.to_html()


@pytest.mark.parametrize("n_shown", [0, 1])
def test_texts_of_special_tokens_alone_have_no_problem_where_they_are_dropped(n_shown: int) -> None:
    atlas = look("bert", ["[CLS]", "[SEP] [SEP]"], special="drop", n_shown=n_shown)
    assert atlas["L0.H0"].solutions == []
    assert all(value is None for value in atlas["L0.H0"].values.values())
    assert len(atlas.record["shown"]) == n_shown


def test_the_model_is_left_as_it_was() -> None:
    model = tiny("bert")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    implementation = model.config._attn_implementation
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    inspect(model, trained("bert"), TEXTS, **SMALL)
    assert model.training
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert hooks == [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


def test_an_atlas_goes_to_disk_and_back(tmp_path: Path) -> None:
    atlas = look("bert")
    atlas.save(tmp_path / "run")
    back = HeadAtlas.load(tmp_path / "run")
    assert back.labels == atlas.labels
    assert numbers(back) == numbers(atlas)
    np.testing.assert_array_equal(back["L1.H0"].matrices["score.fro"], atlas["L1.H0"].matrices["score.fro"])
    frame = atlas.to_dataframe()
    assert list(frame.index) == list(atlas.labels)
    assert frame.loc["L0.H1", "entropy"] == atlas["L0.H1"]["entropy"]
    layers = atlas.layers()
    assert list(layers.index) == [("encoder", 0), ("encoder", 1)]
    mean = np.mean([atlas[f"L1.H{head}"]["entropy"] for head in range(4)])
    assert layers.loc[("encoder", 1), "entropy"] == pytest.approx(mean)
    assert layers.loc[("encoder", 1), "entropy_low"] < mean < layers.loc[("encoder", 1), "entropy_high"]
    assert atlas.report(tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(RecordError, match="could not be written"):
        atlas.report(tmp_path / "absent" / "page.html")
    tiny("bert").save_pretrained(tmp_path / "model")
    with pytest.raises(RecordError, match="holds other files"):
        atlas.save(tmp_path / "model")
    assert atlas["L0.H1"]._repr_html_().startswith("<table><caption>L0.H1, ")
    frame_html = atlas._repr_html_()
    assert frame_html.startswith("<iframe srcdoc=")
    assert 'sandbox="allow-scripts' in frame_html
    assert html.unescape(frame_html.split('srcdoc="')[1].split('" sandbox')[0]) == atlas.to_html()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(RecordError, match="holds other files"):
        atlas.save(tmp_path / "other")
    with pytest.raises(InvalidInputError, match=r"label must be one of its heads, L0.H0 to L1.H3; got L9.H9"):
        atlas["L9.H9"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"layers": (2,)}, r"layers must lie in \[0, 2\), got 2"),
        ({"heads": ("L0.H9",)}, r"heads must name heads of this model, L0.H0 to L1.H3; got L0.H9"),
        ({"layers": (0,), "heads": ("L1.H0",)}, "must have a head in common"),
        ({"batch_size": 0}, "batch_size must be greater than or equal to 1, got 0"),
        ({"space": "outer"}, "space must be 'auto', 'score' or 'residual', got 'outer'"),
        ({"max_queries": -1}, "max_queries must be greater than or equal to 0, got -1"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidInputError, match=sentence):
        look("bert", **settings)


def test_weights_that_are_not_numbers_are_refused() -> None:
    model = tiny("bert")
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] = torch.nan
    with pytest.raises(InvalidInputError, match="finite"):
        inspect(model, trained("bert"), TEXTS, **SMALL)
    assert load(tiny("bert"), trained("bert")).name == "BertModel"
