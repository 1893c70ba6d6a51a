"""The folders of weights: written whole, once, by one of several processes; the T5 is that of its two ONNX files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weights.convert import package_folder
from weights.fixtures import converted, kept
from weights.parity import check_single


def writer(calls: list[Path]) -> Any:
    def write(folder: Path) -> None:
        calls.append(folder)
        (folder / "config.json").write_text(f"{len(calls)}", encoding="utf-8")

    return write


def test_a_folder_is_written_once(tmp_path: Path) -> None:
    calls: list[Path] = []
    found = [kept(tmp_path / "cache", "model", "one", writer(calls)) for _ in range(3)]
    assert len(calls) == 1
    assert set(found) == {tmp_path / "cache" / "model"}
    assert (found[0] / "config.json").read_text(encoding="utf-8") == "1"


def test_another_version_is_written_anew(tmp_path: Path) -> None:
    calls: list[Path] = []
    for stamp in ("one", "two"):
        folder = kept(tmp_path, "model", stamp, writer(calls))
    assert (folder / "config.json").read_text(encoding="utf-8") == "2"
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["model"]


def test_what_broke_off_is_not_kept(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "config.json").write_text("half", encoding="utf-8")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        kept(tmp_path, "model", "one", write)
    assert not (tmp_path / "model").exists()
    calls: list[Path] = []
    assert (kept(tmp_path, "model", "one", writer(calls)) / "config.json").read_text(encoding="utf-8") == "1"


def test_several_at_once_write_one(tmp_path: Path) -> None:
    calls: list[Path] = []
    write = writer(calls)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: kept(tmp_path, "model", "one", write), range(16)))
    assert len(calls) == 1


def test_what_is_not_installed_is_skipped(pytestconfig: pytest.Config) -> None:
    with pytest.raises(pytest.skip.Exception, match=r"no-such-package is not installed; .*make weights"):
        converted(pytestconfig, "no-such-package", writer([]))
    with pytest.raises(pytest.skip.Exception, match="no-such-reader is not installed"):
        converted(pytestconfig, "pytest", writer([]), "no-such-reader")


# -------------------------------------------------------------------------------------------------------- T5 and ONNX


def evaluator(file: Path) -> Any:
    """ONNX's own evaluator, in NumPy, of a graph in int8, but for the rounding of what enters each matrix.

    That rounding, to 8 bits, belongs to the file's arithmetic, not to its weights, and would hide what is compared.
    """
    import onnx
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class DynamicQuantizeLinear(OpRun):
        def _run(self, x: Any) -> tuple[Any, ...]:
            return x, np.array(1, dtype=np.float32), np.array(0, dtype=np.float32)

    class MatMulInteger(OpRun):
        def _run(self, a: Any, b: Any, a_zero_point: Any, b_zero_point: Any) -> tuple[Any, ...]:
            return ((a - a_zero_point) @ (b.astype(np.float32) - b_zero_point.astype(np.float32)),)

    model = onnx.load(file)
    for one in model.opset_import:
        if one.domain == "":
            # The first for which the evaluator has DequantizeLinear; of int8 it is the same before.
            one.version = 19
    return ReferenceEvaluator(model, new_ops=[DynamicQuantizeLinear, MatMulInteger])


@pytest.mark.reference
@torch.no_grad()
def test_t5_says_what_its_files_say(t5: Path) -> None:
    transformers = pytest.importorskip("transformers")
    files = package_folder("traceforge_title_model") / "data" / "span"
    chance = torch.Generator().manual_seed(1)
    ids, target = (torch.randint(3, 32000, (2, length), generator=chance) for length in (9, 6))
    real = (torch.arange(9) < torch.tensor([[9], [5]])).long()
    # The bucket of distance 0 takes a logarithm of 0, which nothing reads.
    with np.errstate(divide="ignore", invalid="ignore"):
        given = {"attention_mask": real.numpy(), "input_ids": ids.numpy()}
        (hidden,) = evaluator(files / "encoder.onnx").run(None, given)
        given = {"encoder_attention_mask": real.numpy(), "encoder_hidden_states": hidden, "input_ids": target.numpy()}
        (logits,) = evaluator(files / "decoder.onnx").run(None, given)
    results = []
    for dtype in (torch.float32, torch.float64):
        model = transformers.T5ForConditionalGeneration.from_pretrained(t5, dtype=dtype, local_files_only=True).eval()
        results.append(model(input_ids=ids, attention_mask=real, decoder_input_ids=target))
    single, exact = results
    assert exact.logits.std() > 1
    check_single(
        torch.tensor(hidden)[real.bool()],
        single.encoder_last_hidden_state[real.bool()],
        exact.encoder_last_hidden_state[real.bool()],
    )
    check_single(torch.tensor(logits), single.logits, exact.logits)
