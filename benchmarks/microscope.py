"""The microscope on MiniLM: capture against the model's own eager attention, and a whole run of the command.

Capture takes turns with the eager forward of transformers, ``output_attentions=True``, so that the pace of the machine
cancels. The inspection is a process of its own, with its wall time and the largest memory of any of its processes.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from attsvm.data.model_files import default_model_path
from attsvm.microscope.calls import AttentionCall
from attsvm.microscope.capture import captured
from benchmarks.harness import at_most, stopwatch
from benchmarks.record import Row

__all__ = ["capture", "inspection"]

ROOT = Path(__file__).resolve().parents[1]


def capture(quick: bool) -> Row:
    """A row: one pass over 16 x 128 tokens, captured with nothing done about it, over the eager one."""
    import transformers

    B, T = (2, 16) if quick else (16, 128)
    before = torch.get_num_threads()
    torch.set_num_threads(1 if quick else 2)
    try:
        usual, eager = (
            transformers.AutoModel.from_pretrained(default_model_path(), attn_implementation=how).eval()
            for how in ("sdpa", "eager")
        )
        ids = torch.randint(1000, 20_000, (B, T), generator=torch.Generator().manual_seed(0))
        weights: dict[int, torch.Tensor] = {}

        def ours() -> None:
            with torch.no_grad(), captured(usual, lambda call: None):
                usual(input_ids=ids)

        def theirs() -> Any:
            with torch.no_grad():
                return eager(input_ids=ids, output_attentions=True)

        def keep(call: AttentionCall) -> None:
            weights[call.info.layer] = call.weights()

        ours()
        wanted = theirs().attentions
        with torch.no_grad(), captured(usual, keep):
            usual(input_ids=ids)
        gap = max(float((weights[layer] - whole).abs().max()) for layer, whole in enumerate(wanted))
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(1 if quick else 15):
            for name, work in (("ours", ours), ("theirs", theirs)):
                seconds[name].append(stopwatch(work)[1])
    finally:
        torch.set_num_threads(before)
    ratio = median(seconds["ours"]) / median(seconds["theirs"])
    return {
        "dtype": "float32",
        "threads": 1 if quick else 2,
        "sizes": {"B": B, "T": T},
        "ours": _side("attsvm, captured", seconds["ours"], gap),
        "peer": _side("transformers, eager with output_attentions", seconds["theirs"], 0.0),
        "ratio": median(seconds["theirs"]) / median(seconds["ours"]),
        "checks": [at_most("time over theirs", ratio, 1.3), at_most("difference of weights", gap, 1e-5)],
    }


def inspection(quick: bool) -> Row:
    """A row: ``attsvm inspect`` of MiniLM on the first 300 sample sentences, all heads, 600 queries a head."""
    n, queries = (4, 10) if quick else (300, 600)
    only = ("--layers", "0") if quick else ()
    with tempfile.TemporaryDirectory() as folder:
        options = ("-n", str(n), "--max-queries", str(queries), *only, "-o", f"{folder}/run", "--json", "--quiet")
        command = [sys.executable, "-m", "attsvm", "inspect", str(default_model_path()), *options]
        done, seconds = stopwatch(lambda: subprocess.run(command, cwd=ROOT, capture_output=True, text=True))
        if done.returncode != 0:
            raise RuntimeError(f"inspect: exit code {done.returncode}\n{done.stderr[-2000:]}")
        record = json.loads(done.stdout)
        page = Path(record["report"]).stat().st_size / 1e6
    # Of the largest process that this one has waited for, theirs included; in KiB.
    gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    gaps = [one["gap"] for head in record["heads"] for one in head["solutions"]]
    return {
        "dtype": "float32",
        "threads": 1 if quick else 2,
        "sizes": {
            "texts": n,
            "tokens": record["corpus"]["n_tokens"],
            "heads": len(record["heads"]),
            "queries": queries,
        },
        "ours": _side("attsvm inspect", [seconds], max(gaps)),
        "checks": [
            at_most("seconds", seconds, 300.0),
            at_most("GiB at the peak of a process", gib, 4.0),
            at_most("MB of the page", page, 16.0),
            at_most("difference from the model's own weights", record["check"]["max_difference"], 1e-5),
        ],
    }


def _side(solver: str, seconds: list[float], gap: float) -> Row:
    spread = [min(seconds), max(seconds)]
    shared = {"status": "done", "objective": None, "iterations": 1, "stopped": False}
    return {"solver": solver, **shared, "gap": gap, "seconds": median(seconds), "spread": spread}
