"""``attsvm doctor``: what it says of this machine and of a model."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from attsvm.cli import doctor
from cli.commands import Commands


def test_machine(shared: Commands) -> None:
    done = shared("doctor", "--json", threads=1)
    assert (done.code, done.err) == (0, "")
    found = done.json
    assert found["versions"]["attsvm"] == metadata.version("attsvm")
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__
    assert found["versions"]["python"] == platform.python_version()
    assert found["cpu"]["count"] == os.cpu_count()
    assert found["cpu"]["torch_threads"] == 1
    assert found["memory"]["total"] > 2**28
    assert len(found["cuda"]) == torch.cuda.device_count()
    assert found["cache"] == {"folder": shared.environment["ATTSVM_CACHE"], "exists": False, "bytes": 0}
    assert "model" not in found


def test_cache_is_measured(attsvm: Commands) -> None:
    folder = Path(attsvm.environment["ATTSVM_CACHE"])
    (folder / "deep").mkdir(parents=True)
    (folder / "one").write_bytes(b"x" * 1000)
    (folder / "deep" / "two").write_bytes(b"x" * 234)
    (folder / "nowhere").symlink_to(folder / "absent")
    found = attsvm("doctor", "--json").json["cache"]
    assert found["exists"]
    assert found["bytes"] == 1234 + len(os.fsencode(folder / "absent"))


def test_words(shared: Commands) -> None:
    done = shared("doctor")
    assert done.code == 0
    for word in ("attsvm", "torch", "processors", "memory", "CUDA", "cache", "extra hf"):
        assert word in done.out
    assert shared("doctor", "-q").out == ""


def fake_metadata() -> None:
    """Another machine: some packages are absent, and one is old."""
    asked = metadata.version

    def version(name: str) -> str:
        if name in ("transformers", "matplotlib"):
            raise metadata.PackageNotFoundError(name)
        return "0.9.2" if name == "gguf" else asked(name)

    metadata.version = version
    metadata.requires = lambda name: [  # type: ignore[assignment]
        "torch>=2.5",
        "transformers>=5.4; extra == 'hf'",
        'gguf>=0.10; extra == "hf"',
        "attsvm[hf]; extra == 'demo'",
        "pytest>=1; extra == 'demo'",
        "matplotlib>=3.9; extra == 'plot'",
        "numpy<9,>=1.0; python_version > '3' and extra == 'fine'",
        "ruff; extra == 'dev'",
    ]


def test_extras_that_are_absent(attsvm: Commands) -> None:
    extras = {one["name"]: one for one in attsvm("doctor", "--json", before=fake_metadata).json["extras"]}
    assert extras.keys() == {"hf", "demo", "plot", "fine"}
    assert extras["hf"]["missing"] == ["transformers", "gguf 0.9.2 is older than 0.10"]
    assert extras["hf"]["command"] == "pip install 'attsvm[hf]'"
    assert extras["demo"]["missing"] == extras["hf"]["missing"]
    assert extras["plot"] == {
        "name": "plot",
        "present": False,
        "missing": ["matplotlib"],
        "command": "pip install 'attsvm[plot]'",
    }
    assert extras["fine"]["present"]
    assert "pip install 'attsvm[plot]'" in attsvm("doctor", before=fake_metadata).out


def test_versions_are_compared_by_their_numbers() -> None:
    assert doctor._problem("numpy>=99999.1") == f"numpy {metadata.version('numpy')} is older than 99999.1"
    assert doctor._problem("numpy>=1.9") is None
    assert doctor._problem("numpy[extra]>=1.9,<100000") is None
    assert doctor._problem("there-is-no-such-package>=1") == "there-is-no-such-package"
    assert doctor._numbers("1.10.0+cpu") > doctor._numbers("1.9.5")


# ------------------------------------------------------------------------------------------------------------ models


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("transformers")
    from unit.microscope.tiny_tokenizers import tiny, trained

    home = tmp_path_factory.mktemp("models")
    for family in ("bert", "llama", "t5"):
        tokenizer = trained(family)
        tiny(family, d_vocab=len(tokenizer)).save_pretrained(home / family)
        tokenizer.save_pretrained(home / family)
    return {path.name: path for path in home.iterdir()}


def model_of(attsvm: Commands, folder: Path, *options: str) -> dict[str, Any]:
    done = attsvm("doctor", str(folder), "--json", *options)
    assert (done.code, done.err) == (0, "")
    return done.json["model"]


def test_encoder(shared: Commands, folders: dict[str, Path]) -> None:
    found = model_of(shared, folders["bert"])
    assert (found["family"], found["n_heads"], found["n_ctx"], found["reads"]) == ("bert", 8, 64, "texts")
    assert [module["spaces"] for module in found["modules"]] == [["score", "residual"]] * 2
    assert found["check"]["compared"]
    assert found["check"]["max_difference"] < 1e-5
    assert found["memory"]["max_tokens"] == 64, "no more than the model takes"
    assert found["memory"]["bytes"] > found["parameter_bytes"]
    assert found["memory"]["fits"]


def test_rotary_decoder(shared: Commands, folders: dict[str, Path]) -> None:
    found = model_of(shared, folders["llama"])
    assert found["modules"][0]["n_kv_heads"] == 2
    assert found["modules"][0]["spaces"] == ["score"]
    assert "rotary" in found["modules"][0]["residual"]
    told = shared("doctor", str(folders["llama"])).out
    assert "decoder layers 0-1: 4 heads, 2 for keys of 8; score space" in told
    assert "no residual space" in told


def test_encoder_decoder(shared: Commands, folders: dict[str, Path]) -> None:
    found = model_of(shared, folders["t5"])
    assert {module["kind"] for module in found["modules"]} == {"encoder", "decoder", "cross"}
    assert "offsets" in found["modules"][0]["terms"]
    assert "logits with offsets" in shared("doctor", str(folders["t5"])).out


def test_pictures(shared: Commands, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from unit.microscope.tiny_tokenizers import tiny

    tiny("vit").save_pretrained(tmp_path / "vit")
    found = model_of(shared, tmp_path / "vit", "--max-tokens", "4")
    assert (found["reads"], found["n_ctx"]) == ("pictures", 10), "nine patches and a token for all of them"
    assert found["memory"]["max_tokens"] == 10


def test_memory_grows_with_what_is_asked(shared: Commands, folders: dict[str, Path]) -> None:
    small = model_of(shared, folders["bert"], "--batch-size", "1", "--max-tokens", "8")["memory"]
    large = model_of(shared, folders["bert"], "--batch-size", "4096", "--max-tokens", "64")["memory"]
    assert (small["batch_size"], small["max_tokens"]) == (1, 8)
    assert large["bytes"] > 3 * small["bytes"]


def test_what_cannot_be_inspected(shared: Commands, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4)
    transformers.MambaModel(config).save_pretrained(tmp_path / "mamba")
    shared("doctor", str(tmp_path / "mamba"), "-q").failed(3, "attention")


def test_bad_arguments(attsvm: Commands, folders: dict[str, Path]) -> None:
    attsvm("doctor", "no/such/model", "-q").failed(2, "doctor: ", "no/such/model")
    attsvm("doctor", "--batch-size", "0").failed(2, "--batch-size", "got 0")
    attsvm("doctor", str(folders["bert"]), "--max-tokens", "-3").failed(2, "--max-tokens", "got -3")
