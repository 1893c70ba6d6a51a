"""What an import costs and changes, each measured in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

HEAVY = {"transformers", "numba", "cvxpy", "matplotlib", "scipy", "sklearn", "pandas", "typer", "rich"}

SIDE_EFFECTS = """
import importlib, json, logging, pkgutil, random
import numpy as np
import torch

def state():
    name, keys, *rest = np.random.get_state()
    return {
        "logging level": logging.root.level,
        "logging disabled": logging.root.manager.disable,
        "root handlers": [repr(handler) for handler in logging.root.handlers],
        "attsvm handlers": [
            repr(handler)
            for logger in logging.root.manager.loggerDict.values()
            if getattr(logger, "name", "").startswith("attsvm")
            for handler in logger.handlers
        ],
        "torch dtype": str(torch.get_default_dtype()),
        "torch device": str(torch.get_default_device()),
        "torch threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "torch determinism": torch.are_deterministic_algorithms_enabled(),
        "torch gradients": torch.is_grad_enabled(),
        "torch randomness": torch.get_rng_state().tolist(),
        "numpy randomness": [name, keys.tolist(), *rest],
        "numpy errors": np.geterr(),
        "numpy printing": repr(np.get_printoptions()),
        "python randomness": repr(random.getstate()),
    }

import rich.console  # draws a link id from Python's generator when it is first imported; that is not ours

before = state()
import attsvm
names = [m.name for m in pkgutil.walk_packages(attsvm.__path__, "attsvm.") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
after = state()
print(json.dumps({"modules": names, "changed": [key for key in before if before[key] != after[key]]}))
"""


def test_import_attsvm_is_light(fresh_python: Callable[[str], str]) -> None:
    said = fresh_python("import attsvm, json, sys; print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))")
    assert HEAVY.isdisjoint(json.loads(said))


@pytest.mark.parametrize("module", ["attsvm.selection", "attsvm.solvers", "attsvm.data", "attsvm.records"])
def test_parts_leave_transformers_and_cvxpy_alone(module: str, fresh_python: Callable[[str], str]) -> None:
    said = fresh_python(f"import {module}, json, sys; print(json.dumps(sorted(sys.modules)))")
    assert {"transformers", "cvxpy", "matplotlib", "typer"}.isdisjoint(json.loads(said))


def test_importing_every_module_changes_no_global_state(fresh_python: Callable[[str], str]) -> None:
    said = json.loads(fresh_python(SIDE_EFFECTS).splitlines()[-1])
    assert len(said["modules"]) > 20
    assert said["changed"] == []
