"""Trajectories on disk: one safetensors file, with what is not an array as JSON in its metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from attsvm.errors import AttSVMError, RecordError
from attsvm.records import package_versions, read_arrays, write_arrays
from attsvm.selection.arrays import Kind
from attsvm.selection.problem import TokenSelection

if TYPE_CHECKING:
    from attsvm.dynamics.trajectory import Trajectory

__all__ = ["read_trajectory", "write_trajectory"]

FORMAT = "attsvm.trajectory"
VERSION = 1

RECORDED = ("steps", "W", "loss", "norm", "attention_mass", "selected", "probabilities", "scores", "stalled")
OPTIONAL = ("K", "Q", "head", "log_time")
PROBLEM = ("tokens", "queries", "allowed", "selected", "margin", "offsets")
TEXTS = ("parameterization", "loss_name", "optimizer", "own_norm")
DTYPES = {str(dtype): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


def write_trajectory(trajectory: Trajectory, path: Path) -> None:
    """Write a trajectory; raises RecordError if that fails."""
    arrays: dict[str, np.ndarray] = {}
    for name in (*RECORDED, *OPTIONAL):
        value = getattr(trajectory, name)
        if value is not None:
            arrays[name] = _array(value)
    for name in PROBLEM:
        value = getattr(trajectory.problem.tensors, name)
        if value is not None:
            arrays[f"problem.{name}"] = _array(value)
    kind = trajectory.problem.kind
    about = {
        "format": FORMAT,
        "version": VERSION,
        "versions": package_versions("torch", "numpy"),
        "kind": {"is_torch": kind.is_torch, "dtype": str(kind.dtype)},
        **{name: getattr(trajectory, name) for name in TEXTS},
    }
    write_arrays(path, arrays, {"about": json.dumps(about)})


def read_trajectory(path: Path) -> dict[str, Any]:
    """The fields of a trajectory; raises RecordError for a file that is missing, damaged or foreign."""
    arrays = read_arrays(path)
    about = _about(path)
    try:
        kind = Kind(
            is_torch=bool(about["kind"]["is_torch"]), dtype=DTYPES[about["kind"]["dtype"]], device=torch.device("cpu")
        )
        problem = _problem({name: torch.from_numpy(arrays[name]) for name in arrays if "problem." in name}, kind)
        values = {name: torch.from_numpy(arrays[name]) for name in (*RECORDED, *OPTIONAL) if name in arrays}
        values["stalled"] = values["stalled"].reshape((len(problem),) if problem.is_batch else ())
        _require_shapes(values, problem)
        scores, stalled = values.pop("scores"), values.pop("stalled")
        back: dict[str, Any] = {name: kind.back(value) for name, value in values.items()}
        return {
            **back,
            **{name: back.get(name) for name in OPTIONAL},
            **{name: about[name] for name in TEXTS},
            "scores": scores,
            "stalled": kind.back(stalled) if problem.is_batch else bool(stalled),
            "problem": problem,
        }
    except (KeyError, TypeError, ValueError, RuntimeError, AttSVMError) as error:
        raise RecordError(f"{path} is not a whole trajectory that attsvm wrote: {error}.") from error


def _array(value: Any) -> np.ndarray:
    return torch.as_tensor(value).detach().cpu().contiguous().numpy()


def _about(path: Path) -> dict[str, Any]:
    """The metadata of the file."""
    try:
        with safe_open(path, framework="numpy") as handle:
            about = json.loads((handle.metadata() or {}).get("about", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise RecordError(f"{path} could not be read: {error}.") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise RecordError(f"{path} is not a trajectory that attsvm wrote.")
    if about.get("version") != VERSION:
        raise RecordError(f"{path} is a trajectory of version {about.get('version')}; this attsvm reads {VERSION}.")
    return about


def _problem(parts: dict[str, torch.Tensor], kind: Kind) -> TokenSelection:
    t = {name: parts.get(f"problem.{name}") for name in PROBLEM}
    tokens, margin = t["tokens"], t["margin"]
    if tokens is None or margin is None:
        raise KeyError("problem")
    return TokenSelection(
        kind.back(tokens),
        t["queries"],
        t["selected"],
        allowed=t["allowed"],
        offsets=t["offsets"],
        margin=margin if margin.ndim > 1 else margin.item(),  # a number is stored as an array of one
    )


def _require_shapes(values: dict[str, torch.Tensor], problem: TokenSelection) -> None:
    """Refuse arrays that do not belong together."""
    n, Q, T, d = problem.shape
    lead = (len(problem),) if problem.is_batch else ()
    records = len(values["steps"])
    expected = {"steps": (records,), "W": (*lead, records, d, d), "selected": (*lead, n, Q), "stalled": lead}
    expected |= dict.fromkeys(("probabilities", "scores"), (*lead, n, Q, T))
    expected |= dict.fromkeys(("loss", "norm", "attention_mass", "log_time"), (*lead, records))
    expected["head"] = (*lead, records, d)
    for name, shape in expected.items():
        if name not in values and name in OPTIONAL:
            continue
        if tuple(values[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(values[name].shape)} where {shape} belongs")
