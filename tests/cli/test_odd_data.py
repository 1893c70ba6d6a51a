"""Data that is legal but odd: the run ends with a stated result, and hostile text stays text."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cli.commands import Commands, Outcome
from cli.data import FAST, arrays_at, result_at, some_arrays, write_csv, write_jsonl, write_npz


def run(attsvm: Commands, data: Path, *options: str) -> dict[str, Any]:
    """Run on ``data`` to its end and return the result, which must be the same on stdout and on disk."""
    done: Outcome = attsvm("verify", data.name, *FAST, *options, "-o", "run", "--json")
    assert done.code == 0, done.err
    assert (attsvm.home / "run" / "report.html").stat().st_size > 10_000
    result = result_at(attsvm.home / "run")
    assert done.json == {**result, "run": "run"}
    assert result["verdict"] in done.err
    return result


def test_infeasible_texts(attsvm: Commands) -> None:
    """The same words in another order under opposite labels: no head, no training, and no matrix for what is left."""
    result = run(attsvm, write_csv(attsvm.home / "data.csv", [("good bad", 1), ("bad good", 0)]))
    assert "no matrix separates" in result["verdict"]
    for one in result["parameterizations"].values():
        assert (one["status"], one["verdict"], one["locally_optimal"]) == ("infeasible", "neither", None)
        assert one["ray_sequences"] == [0, 1]
        assert (one["upper_bound"], one["lower_bound"], one["gap"], one["rank"]) == (None, None, None, None)
        assert (one["correlation"], one["correlation_other"]) == (None, None)
        assert [pick["token"] for pick in one["selected"]] == ["good", "bad"]
    arrays = arrays_at(attsvm.home / "run")
    assert "W.solution" not in arrays
    assert (arrays["W.ray"] > 0).sum() == 2
    assert "no matrix separates" in (attsvm.home / "run" / "report.html").read_text(encoding="utf-8")


def test_infeasible_arrays_and_what_their_ray_proves(attsvm: Commands) -> None:
    X = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]])
    z = np.array([[1.0, 2.0], [1.0, 2.0]])
    np.savez(attsvm.home / "data.npz", X=X, z=z, scores=np.zeros((2, 2)))
    result = run(attsvm, attsvm.home / "data.npz")
    assert {one["status"] for one in result["parameterizations"].values()} == {"infeasible"}
    arrays = arrays_at(attsvm.home / "run")
    ray, own = arrays["W.ray"], X[np.arange(2), arrays["W.selected"]]
    assert ray.min() >= 0
    assert ray.sum() > 0
    np.testing.assert_allclose(np.einsum("nt,ntd,ne->de", ray, own[:, None] - X, z), 0, atol=1e-9)


def test_same_text_under_both_labels(attsvm: Commands) -> None:
    result = run(attsvm, write_csv(attsvm.home / "data.csv", [("a good film", 1), ("a good film", 0)]))
    assert "left nothing to compare" in result["verdict"]
    for one in result["parameterizations"].values():
        assert (one["status"], one["correlation"]) == ("optimal", None)
        assert one["attention_mass"] == pytest.approx(1 / 3), "training never left W = 0"


def test_all_tokens_identical(attsvm: Commands) -> None:
    result = run(attsvm, write_csv(attsvm.home / "data.csv", [("film film", 1), ("film film film", 0)]))
    assert (result["n_constraints"], result["n_merged"]) == (0, 3)
    for one in result["parameterizations"].values():
        assert (one["status"], one["upper_bound"], one["gap"], one["rank"]) == ("optimal", 0, 0, 0)
        assert one["correlation"] is None
        assert one["margin"] is None, "infinite: nothing is asked"


def test_identical_arrays(attsvm: Commands) -> None:
    result = run(attsvm, write_npz(attsvm.home / "data.npz", X=np.ones((6, 5, 7))))
    assert result["n_constraints"] == 0
    assert {one["verdict"] for one in result["parameterizations"].values()} == {"global"}


def test_texts_of_one_token(attsvm: Commands) -> None:
    result = run(attsvm, write_csv(attsvm.home / "data.csv", [("good", 1), ("bad", 0)]))
    assert result["n_constraints"] == 0
    for one in result["parameterizations"].values():
        assert (one["attention_mass"], one["fraction_globally_optimal"]) == (1, 1)
        assert [pick["token"] for pick in one["selected"]] == ["good", "bad"]


def test_one_sequence(attsvm: Commands) -> None:
    scores = np.array([[0.0, 2.0, 1.0]])
    np.savez(attsvm.home / "data.npz", X=np.eye(3)[None], z=np.ones((1, 3)), scores=scores)
    result = run(attsvm, attsvm.home / "data.npz", "--steps", "500")
    one = result["parameterizations"]["W"]
    assert (one["status"], one["verdict"], one["selected"][0]["index"]) == ("optimal", "global", 1)
    # x_1 - x_0 and x_1 - x_2 against z = 1: W = u z^T / 3 with the smallest u that has margin 1, (-1, 2, -1) / 3.
    assert one["upper_bound"] == pytest.approx(math.sqrt(6) / 3 / math.sqrt(3), rel=1e-6)
    assert one["correlation"] > 0.99


def test_a_query_of_zeros(attsvm: Commands) -> None:
    """A zero query has the same logit for every token, so no matrix serves it."""
    rng = np.random.default_rng(0)
    np.savez(attsvm.home / "data.npz", X=rng.standard_normal((2, 3, 4)), z=np.zeros((2, 4)), y=[1, -1])
    result = run(attsvm, attsvm.home / "data.npz")
    assert {one["status"] for one in result["parameterizations"].values()} == {"infeasible"}


@pytest.mark.parametrize("size", [1e-60, 1e60])
def test_tokens_of_any_size(attsvm: Commands, size: float) -> None:
    write_npz(attsvm.home / "data.npz", X=size * some_arrays()["X"])
    result = run(attsvm, attsvm.home / "data.npz", "--parameterization", "W")
    assert result["parameterizations"]["W"]["status"] in ("optimal", "iteration_limit")


def test_empty_texts_are_left_out_and_counted(attsvm: Commands) -> None:
    rows = [("a good film", 1), ("   ", 1), ("", 0), ("a bad film", 0), ("\t", 0), ("no label", "")]
    result = run(attsvm, write_csv(attsvm.home / "data.csv", rows))
    assert (result["n_sequences"], result["data"]["n_skipped"]) == (2, 4)
    assert [one["text"] for one in result["sequences"]] == ["a good film", "a bad film"]


HOSTILE = (
    "<script>alert('x')</script> good",
    "</script><img src=x onerror=alert(1)> bad",
    "quotes \" and ' and `${x}` {{ x }} good",
    "bell \x07 escape \x1b[31m null-ish \x01 bad",
    "\u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd good",
    "emoji \U0001f600 combining e\u0301 line\u2028break bad",
    "half \ud83d surrogate good",
    "&lt;b&gt; &amp; <!-- comment bad",
)


def test_hostile_text_stays_text(attsvm: Commands) -> None:
    rows = [(text, "good" if text.endswith("good") else "bad") for text in HOSTILE]
    result = run(attsvm, write_jsonl(attsvm.home / "data.jsonl", rows))
    texts = [one["text"] for one in result["sequences"]]
    assert texts == [text.replace("\ud83d", "\ufffd") for text in HOSTILE]
    page = (attsvm.home / "run" / "report.html").read_text(encoding="utf-8")
    scripts = re.findall(r"<script\b[^>]*>", page)
    assert page.count("</script") == len(scripts), "no text opened or ended a script"
    assert "<img" not in page
    assert "alert('x')</script>" not in page
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", page)
    assert not re.search(r"[\u202a-\u202e\u2066-\u2069]", re.sub(r"<style.*?</style>", "", page, flags=re.DOTALL))


def test_a_line_of_a_megabyte(attsvm: Commands) -> None:
    long = "word " * 200_000
    result = run(attsvm, write_csv(attsvm.home / "data.csv", [(long + "good", 1), ("a bad film", 0)]))
    assert result["data"]["n_truncated"] == 1
    assert [one["n_tokens"] for one in result["sequences"]] == [512, 4]
    shutil.rmtree(attsvm.home / "run")
    result = run(attsvm, write_csv(attsvm.home / "data.csv", [("x" * 1_000_000, 1), ("a bad film", 0)]))
    assert result["data"]["n_truncated"] == 0
    assert len(result["sequences"][0]["tokens"][1]) == 1_000_000


def test_file_with_an_odd_name(attsvm: Commands) -> None:
    data = write_csv(attsvm.home / "my data; <b> $(x) ü.csv")
    done = attsvm("verify", data.name, *FAST, "--json")
    assert done.json["run"] == "runs/my data; <b> $(x) ü"
    assert json.dumps(done.json["command"]).count("'") == 2, "quoted, so that it can be typed again"


# ------------------------------------------------------------------------------------------------------------ a model


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with random weights, two layers, d = 8 and room for 20 tokens."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("encoder")
    words = "[PAD] [UNK] [CLS] [SEP] the film is good bad em ##bed ##ding . a".split()
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=20,
        initializer_range=0.5,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def with_encoder(encoder: Path) -> Callable[..., tuple[str, ...]]:
    return lambda *options: ("verify", "data.csv", "--model", str(encoder), "--steps", "40", "-o", "run", *options)


def test_longer_texts_than_the_model_takes_are_cut_and_counted(
    attsvm: Commands, with_encoder: Callable[..., tuple[str, ...]]
) -> None:
    long = "the film is good " * 10
    write_csv(attsvm.home / "data.csv", [(long, 1), ("the film is bad .", 0), ("a good embedding", 1), (long, 0)])
    done = attsvm(*with_encoder("--layer", "1"))
    assert done.code == 0, done.err
    assert "2 texts cut" in done.err
    result = result_at(attsvm.home / "run")
    assert result["data"] | {"n_truncated": 2, "layer": 1, "embedding": "model", "kind": "text"} == result["data"]
    assert [one["n_tokens"] for one in result["sequences"]] == [20, 7, 7, 20]
    allowed = arrays_at(attsvm.home / "run")["allowed"]
    assert allowed.sum(1).tolist() == [18, 5, 5, 18], "special tokens and padding are not"
    assert result["d_model"] == 8


NOTHING = "\u200b"
"""A text that is not empty, of which the tokenizer leaves nothing."""


def test_texts_without_tokens_are_left_out_and_counted(
    attsvm: Commands, with_encoder: Callable[..., tuple[str, ...]]
) -> None:
    write_csv(attsvm.home / "data.csv", [("a good film", 1), (NOTHING, 1), ("a bad film", 0), ("", 0)])
    done = attsvm(*with_encoder())
    assert done.code == 0, done.err
    assert "2 rows without text or label skipped" in done.err
    result = result_at(attsvm.home / "run")
    assert (result["n_sequences"], result["data"]["n_skipped"], result["data"]["n_available"]) == (2, 2, 3)
    write_csv(attsvm.home / "data.csv", [("good", 1), ("the film", 1), (NOTHING, 0)])
    attsvm(*with_encoder("--overwrite")).failed(2, "data.csv", "two labels")


def test_layer_counts_and_must_exist(attsvm: Commands, with_encoder: Callable[..., tuple[str, ...]]) -> None:
    write_csv(attsvm.home / "data.csv", [("the film is good", 1), ("the film is bad .", 0)])
    attsvm(*with_encoder("--layer", "3")).failed(2, "layer", "[-3, 2]", "got 3")
    attsvm(*with_encoder("--device", "nonsense")).failed(2, "device", "'nonsense'")
    assert not (attsvm.home / "run").exists()
    found = {}
    for layer in ("0", "2", "-1"):
        assert attsvm(*with_encoder("--layer", layer, "--overwrite")).code == 0
        found[layer] = arrays_at(attsvm.home / "run")["scores"]
    np.testing.assert_array_equal(found["2"], found["-1"])
    assert np.abs(found["0"] - found["2"]).max() > 0


def test_second_run_reads_the_embedding_from_the_cache(
    attsvm: Commands, with_encoder: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    write_csv(attsvm.home / "data.csv", [("the film is good", 1), ("the film is bad .", 0)])
    assert attsvm(*with_encoder()).code == 0
    first = arrays_at(attsvm.home / "run")
    stored = list((tmp_path / "cache").rglob("*.safetensors"))
    assert len(stored) == 1
    assert attsvm(*with_encoder("--overwrite"), before=no_models).code == 0
    second = arrays_at(attsvm.home / "run")
    np.testing.assert_array_equal(first["scores"], second["scores"])


def no_models() -> None:
    from attsvm.data import embeddings

    embeddings._Encoder = None
