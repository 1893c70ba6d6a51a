"""One module for each published figure; :func:`find_recipe` loads them by name."""

from attsvm.experiments.recipes.recipe import Case, Number, Paper, Recipe, Record, Summary, Table
from attsvm.experiments.recipes.registry import NAMES, find_recipe, match_names

__all__ = [
    "NAMES",
    "Case",
    "Number",
    "Paper",
    "Recipe",
    "Record",
    "Summary",
    "Table",
    "find_recipe",
    "match_names",
]
