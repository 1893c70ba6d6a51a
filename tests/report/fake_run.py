"""A small run folder with everything the page shows, made up from a seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from attsvm.records import RunFolder

Change = Callable[[dict[str, Any], dict[str, np.ndarray]], None]
WriteRun = Callable[..., Path]

WORDS = (
    "a an the this film movie story plot cast is was feels so very never always quite too and but with of in "
    "brilliant charming moving funny dull tedious hollow clumsy warm sharp lovely flat witty tired honest bland "
    "director camera script ending performance minutes hours audience nothing everything"
).split()
POSITIVE = {"brilliant", "charming", "moving", "funny", "warm", "sharp", "lovely", "witty", "honest"}
NEGATIVE = {"dull", "tedious", "hollow", "clumsy", "flat", "tired", "bland", "never", "nothing"}
D_MODEL = 24
STEPS = [0, 1, 2, 3, 5, 8, 12, 18, 27, 40, 60, 90, 135, 200, 300, 450, 675, 1000, 1500, 2000]


def sequences(generator: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Sentences of random words; the optimal token is the one that speaks for the label most."""
    made = []
    for index in range(count):
        label = "positive" if index % 2 else "negative"
        words = generator.choice(WORDS, size=int(generator.integers(5, 24))).tolist()
        telling = sorted(POSITIVE if label == "positive" else NEGATIVE)
        place = int(generator.integers(0, len(words)))
        words[place] = telling[int(generator.integers(0, len(telling)))]
        made.append(
            {
                "text": " ".join(words).capitalize() + ".",
                "label": label,
                "tokens": ["[CLS]", *words, ".", "[SEP]"],
                "optimal": place + 1,
                "n_tokens": len(words) + 3,
            }
        )
    return made


def token_arrays(
    generator: np.random.Generator, rows: list[dict[str, Any]], allowed: np.ndarray, miss: float
) -> dict[str, np.ndarray]:
    """Margins, duals and attention of one parameterisation; a share ``miss`` selects another token."""
    shape = allowed.shape
    selected = np.array([row["optimal"] for row in rows])
    for index in np.flatnonzero(generator.random(shape[0]) < miss):
        selected[index] = int(generator.choice(np.flatnonzero(allowed[index])))
    asked = allowed.copy()
    asked[np.arange(shape[0]), selected] = False
    support = asked & (generator.random(shape) < 0.25)
    margins = np.where(support, 1.0, 1.0 + generator.gamma(2.0, 0.6, shape))
    trained = margins + generator.normal(0.0, 0.12, shape)
    margins, trained = np.where(asked, margins, np.inf), np.where(asked, trained, np.inf)
    weights = np.where(asked, np.exp(-5 * np.where(asked, trained, 0.0)), 0.0)
    weights[np.arange(shape[0]), selected] = 1.0
    return {
        "selected": selected.astype(np.int64),
        "margins": margins,
        "trained_margins": trained,
        "support": support,
        "duals": np.where(support, generator.gamma(1.5, 0.02, shape), 0.0),
        "probabilities": weights / weights.sum(axis=1, keepdims=True),
    }


def parameterization(key: str, rows: list[dict[str, Any]], arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Write the numbers of one parameterisation."""
    own, other = ("fro", "nuc") if key == "W" else ("nuc", "fro")
    final, final_other = (0.962, 0.714) if key == "W" else (0.937, 0.655)
    rise = 1 - np.exp(-np.array(STEPS) / 180.0)
    selected = arrays[f"{key}.selected"]
    same = selected == np.array([row["optimal"] for row in rows])
    return {
        "parameterization": key,
        "norm": own,
        "norm_other": other,
        "status": "optimal",
        "status_sentence": "The gap between the upper and the lower bound is below the tolerance.",
        "gap": 3.1e-7,
        "upper_bound": 12.3456789,
        "lower_bound": 12.3456751,
        "margin": 1.0,
        "n_support": int(arrays[f"{key}.support"].sum()),
        "rank": 22 if key == "W" else 6,
        "method": "coordinate+newton" if key == "W" else "primal-dual",
        "iterations": 80,
        "solve_seconds": 1.21,
        "correlation": final,
        "correlation_other": final_other,
        "steps": STEPS,
        "correlation_curve": [None, *(final * rise[1:]).tolist()],
        "correlation_other_curve": [None, *(final_other * rise[1:]).tolist()],
        "attention_mass_curve": (0.12 + 0.878 * rise).tolist(),
        "norm_curve": (0.02 * np.array(STEPS)).tolist(),
        "loss_curve": (0.05 + 0.64 * (1 - rise)).tolist(),
        "attention_mass": 0.998,
        "fraction_globally_optimal": float(same.mean()),
        "locally_optimal": True,
        "verdict": "global" if key == "W" else "local",
        "reason": "Training kept the highest-scoring token in most sentences and its direction is that of the SVM.",
        "selected": [
            {"text": row["text"], "token": row["tokens"][index], "index": int(index)}
            for row, index in zip(rows, selected, strict=True)
        ],
        "other": {"status": "optimal", "gap": 8e-6, "upper_bound": 40.1, "lower_bound": 40.0999, "rank": 6},
    }


def make_run(count: int = 60, seed: int = 7) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return ``result.json`` and the arrays of a run."""
    generator = np.random.default_rng(seed)
    rows = sequences(generator, count)
    longest = max(len(row["tokens"]) for row in rows)
    allowed = np.zeros((count, longest), dtype=bool)
    for index, row in enumerate(rows):
        allowed[index, 1 : len(row["tokens"]) - 1] = True
    scores = np.where(allowed, generator.normal(0.0, 0.4, allowed.shape), 0.0)
    for index, row in enumerate(rows):
        scores[index, row["optimal"]] = scores[index].max() + 0.3
    arrays: dict[str, np.ndarray] = {"allowed": allowed, "scores": scores}
    for key, miss in (("W", 0.08), ("KQ", 0.2)):
        arrays |= {f"{key}.{name}": value for name, value in token_arrays(generator, rows, allowed, miss).items()}
        decay = np.exp(-np.arange(D_MODEL) / 6.0)
        arrays[f"{key}.singular_values"] = 3.1 * decay
        arrays[f"{key}.other_singular_values"] = 5.2 * np.where(np.arange(D_MODEL) < 6, decay, 1e-13)
        arrays[f"{key}.trained_singular_values"] = 40.0 * decay * generator.uniform(0.8, 1.0, D_MODEL)
        arrays[f"{key}.solution"] = arrays[f"{key}.weights"] = generator.normal(size=(D_MODEL, D_MODEL))
    result = {
        "kind": "verify",
        "name": "movie-reviews",
        "created": "2026-11-21T06:10:00+00:00",
        "command": "attsvm verify --seed 0 --output-dir runs/movie-reviews",
        "seed": 0,
        "versions": {"python": "3.11.7", "attsvm": "0.1.0", "torch": "2.13.0"},
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "seconds": {"embedding": 3.1, "training": 20.0, "solving": 9.0, "total": 33.0},
        "data": {
            "source": "movie-reviews (embedded sample)",
            "kind": "text",
            "label_names": ["negative", "positive"],
            "n_truncated": 2,
            "n_skipped": 1,
            "model": "all-MiniLM-L6-v2",
            "layer": 6,
            "embedding": "model",
            "query": "first token",
            "head": "ridge",
            "content_hash": "9f2c" * 16,
        },
        "n_sequences": count,
        "n_queries": count,
        "n_constraints": int(sum(np.isfinite(arrays["W.margins"]).sum(axis=1))),
        "n_merged": 3,
        "d_model": D_MODEL,
        "verdict": "Training moved both W and (K, Q) in the direction of their max-margin token separators. "
        "W agrees with the Frobenius-norm solution at 0.96, (K, Q) with the nuclear-norm solution at 0.94.",
        "parameterizations": {key: parameterization(key, rows, arrays) for key in ("W", "KQ")},
        "sequences": rows,
    }
    return result, arrays


def make_infeasible(result: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Change a run so that the problem of W has no solution."""
    own = result["parameterizations"]["W"]
    for name in ("gap", "upper_bound", "lower_bound", "correlation", "correlation_other", "n_support", "rank"):
        own[name] = None
    own |= {
        "status": "infeasible",
        "status_sentence": "No matrix separates the selected tokens; the ray proves it.",
        "ray_sequences": [3, 11],
        "verdict": "neither",
        "other": None,
        "correlation_curve": [None] * len(STEPS),
        "correlation_other_curve": [None] * len(STEPS),
    }
    for name in ("margins", "trained_margins", "support", "duals", "singular_values", "other_singular_values"):
        del arrays[f"W.{name}"]
    del arrays["W.solution"]


HOSTILE = (
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=2>",
    "\u202egnp.exe",
    "\u0000\u0007\u001b[31m",
    "line\u2028break\u2029",
    "",
    "   ",
    "\u200b",
    "\ud800",
    "z" * 5000,
    "a\u0301\u0302\u0303\u0304\u0305" * 30,
    "{{ 7*7 }}",
    "&lt;b&gt;",
    "\u05e9\u05dc\u05d5\u05dd",
)


def make_hostile(result: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Put hostile strings wherever a string can come from outside."""
    del arrays
    for row in result["sequences"]:
        row["tokens"][: len(HOSTILE)] = HOSTILE[: len(row["tokens"])]
        row["label"] = "=cmd|'/C calc'!A0" if row["label"] == "positive" else "<script>window.pwned=3</script>"
    result["sequences"][0]["text"] = "x" * 1_000_000
    result["sequences"][1]["text"] = HOSTILE[0] + "\u202e\n" + HOSTILE[1]
    result["sequences"][2]["text"] = "\u05e9\u05dc\u05d5\u05dd " * 20
    for name in ("name", "verdict", "command", "commit"):
        result[name] = f"{HOSTILE[0]} \u202e {HOSTILE[1]}"
    result["data"]["source"] = result["data"]["model"] = HOSTILE[0] + "y" * 300
    result["versions"] = {HOSTILE[0]: HOSTILE[1]}
    result["parameterizations"]["W"]["reason"] = HOSTILE[0] + "\u202e"
    result["parameterizations"]["W"]["verdict"] = HOSTILE[1]
    result["parameterizations"]["W"]["method"] = HOSTILE[0]


def write(folder: Path, result: dict[str, Any], arrays: dict[str, np.ndarray]) -> Path:
    """Write a run folder."""
    run = RunFolder(folder)
    run.create()
    run.write_config({"seed": 0, "training": {"steps": 2000, "optimizer": "ngd"}})
    run.write_metrics([])
    run.write_arrays(arrays)
    run.write_result(result)
    return folder
