"""Few trials of a recipe, as the runner would make them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from attsvm.experiments.recipes import Case, Number, Recipe, Record, Summary, find_recipe
from attsvm.experiments.recipes.plotting import house


def through_json(value: Any) -> Any:
    """As a record comes back from its file: numbers that are not finite are None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: through_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [through_json(item) for item in value]
    return value


def run_cases(recipe: Recipe, trials: int, cases: Sequence[Case] | None = None) -> list[Record]:
    """Records of the first ``trials`` seeds of some cases, or of all."""
    seeds = range(recipe.first_seed, recipe.first_seed + trials)
    records = []
    for case in recipe.cases if cases is None else cases:
        for seed, record in zip(seeds, recipe.run(case, seeds), strict=True):
            records.append({"case": case.name, "trial": seed, **through_json(record)})
    found: list[Record] = json.loads(json.dumps(records, allow_nan=False))
    return found


def full(name: str, cases: Sequence[str] | None = None) -> tuple[list[Record], Summary]:
    """Records of the published numbers of trials, in chunks as the runner takes them, and what they say."""
    recipe, records = find_recipe(name), []
    for case in recipe.cases:
        if cases is not None and not any(part in case.name for part in cases):
            continue
        last = recipe.first_seed + (case.trials or recipe.trials)
        for first in range(recipe.first_seed, last, recipe.chunk):
            seeds = range(first, min(first + recipe.chunk, last))
            chunk = zip(seeds, recipe.run(case, seeds), strict=True)
            records += [{"case": case.name, "trial": seed, **through_json(record)} for seed, record in chunk]
    return records, recipe.summarize(records)


def check_page(recipe: Recipe, records: Sequence[Record]) -> Summary:
    """The page of records: rows as wide as their table, a figure with something on it; also for no records at all."""
    for some in (records, records[:1], []):
        summary = recipe.summarize(some)
        for table in summary.tables:
            assert {len(row) for row in table.rows} <= {len(table.columns)}
        with house():
            figure = Figure()
            recipe.draw(figure, some)
            assert figure.axes
            figure.draw_without_rendering()
    return recipe.summarize(records)


def number(summary: Summary, part: str) -> Number:
    """The one number whose text has ``part``."""
    found = [one for one in summary.numbers if part in one.text]
    assert len(found) == 1, [one.text for one in found]
    return found[0]


def same_alone(recipe: Recipe, case: Case, seeds: Sequence[int]) -> None:
    """A trial does not depend on the chunk that it is in."""
    together = recipe.run(case, seeds)
    for seed, record in zip(seeds, together, strict=True):
        close(through_json(record), through_json(recipe.run(case, [seed])[0]))


def close(first: Any, second: Any) -> None:
    """The same to 1e-10, all the way down."""
    assert type(first) is type(second)
    if isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            close(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            close(one, other)
    elif isinstance(first, float):
        assert math.isclose(first, second, rel_tol=1e-10, abs_tol=1e-10), (first, second)
    else:
        assert first == second
