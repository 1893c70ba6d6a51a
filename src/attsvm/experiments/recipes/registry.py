"""The recipes by name. A module is loaded when its recipe is asked for."""

from __future__ import annotations

import difflib
import fnmatch
import importlib
from collections.abc import Sequence

from attsvm.errors import InvalidInputError
from attsvm.experiments.recipes.recipe import Recipe

__all__ = ["NAMES", "find_recipe", "match_names"]

NAMES = (
    *("tfsvm-fig1", "tfsvm-fig2", "tfsvm-fig3", "tfsvm-fig4", "tfsvm-fig5", "tfsvm-fig6", "tfsvm-fig7"),
    *("feasibility", "regpath", "cones", "equal-scores"),
    *("maxmargin-single", "maxmargin-multi", "maxmargin-loss", "maxmargin-joint"),
    *("rates", "flow", "ntp-global", "ntp-local", "mirror", "single-location", "multihead", "depth"),
)
"""Every recipe, in the order of the gallery. ``tfsvm-fig1`` is ``RECIPE`` in the module ``tfsvm_fig1``."""


def find_recipe(name: str) -> Recipe:
    """The recipe of that name, one of ``NAMES``."""
    module = importlib.import_module(f"attsvm.experiments.recipes.{name.replace('-', '_')}")
    recipe: Recipe = module.RECIPE
    return recipe


def match_names(patterns: Sequence[str]) -> list[str]:
    """The names that match shell patterns such as ``maxmargin-*``, in the order of the gallery.

    Raises
    ------
    InvalidInputError
        If a pattern matches none.
    """
    for pattern in patterns:
        if not fnmatch.filter(NAMES, pattern):
            close = difflib.get_close_matches(pattern, NAMES, n=1, cutoff=0.4)
            meant = f"did you mean {close[0]}?" if close else f"there are {', '.join(NAMES)}."
            raise InvalidInputError(f"reproduce: no recipe is named {pattern!r}; {meant}")
    return [name for name in NAMES if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
