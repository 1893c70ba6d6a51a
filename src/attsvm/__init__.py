"""attsvm: attention selects tokens; which ones, with what margin, and where training takes them.

The public names are loaded when first used, so that ``import attsvm`` costs no more than numpy and torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy  # noqa: F401  (the two libraries that every use needs)
import torch  # noqa: F401

if TYPE_CHECKING:
    from attsvm.dynamics import Trajectory, descend
    from attsvm.selection import TokenSelection, correlation
    from attsvm.solvers import Solution, Status, solve

__version__ = "0.1.0"

__all__ = ["Solution", "Status", "TokenSelection", "Trajectory", "__version__", "correlation", "descend", "solve"]

_HOMES = {
    "Solution": "attsvm.solvers",
    "Status": "attsvm.solvers",
    "TokenSelection": "attsvm.selection",
    "Trajectory": "attsvm.dynamics",
    "correlation": "attsvm.selection",
    "descend": "attsvm.dynamics",
    "solve": "attsvm.solvers",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'attsvm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
