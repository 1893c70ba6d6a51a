"""What a recipe is: one published figure as cases, trials, numbers and a picture.

A trial is one seed in one case. Trials of a chunk advance together; a chunk is computed, and lost, as a whole. The
runner (:mod:`attsvm.experiments.reproduce`) owns folders, records, resuming and the sharing among processes; a
recipe is functions of seeds and records, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Case", "Number", "Paper", "Recipe", "Record", "Summary", "Table"]

Record: TypeAlias = dict[str, Any]
"""What one trial leaves: numbers, strings and lists of them; the runner adds ``case`` and ``trial`` (the seed)."""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Where a figure was published."""

    title: str
    authors: str
    year: int
    arxiv: str


@dataclass(frozen=True, kw_only=True)
class Case:
    """One setting of a recipe, such as one dimension d.

    Attributes
    ----------
    name
        Short and unique within the recipe, such as ``"d=4"``.
    values
        The parameters, such as ``{"n": 6, "T": 8, "d": 4}``; plain numbers and strings.
    trials
        Trials of this case where they are not those of the recipe.
    """

    name: str
    values: Mapping[str, Any] = field(default_factory=dict)
    trials: int | None = None


@dataclass(frozen=True, kw_only=True)
class Number:
    """One number of the figure: ours, beside what was published.

    Attributes
    ----------
    text
        What it is, in a few words with its setting: "correlation of W with the Frobenius SVM, 1000 steps".
    ours
        None where nothing could be measured.
    published
        None where no number was published.
    low, high
        The range in which ours counts as met; None for no bound on that side.
    source
        Where the number or the range comes from: "Fig. 5(b)", "Theorem 1".
    """

    text: str
    ours: float | None
    published: float | None = None
    low: float | None = None
    high: float | None = None
    source: str = ""

    @property
    def verdict(self) -> Literal["met", "differs", "not published"]:
        """How ours compares; without a range and a published number there is nothing to compare with."""
        if self.low is None and self.high is None:
            return "not published"
        if self.ours is None or not math.isfinite(self.ours):
            return "differs"
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        return "met" if low <= self.ours <= high else "differs"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the page; every row has a cell for each column."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int | None]]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What the trials say together.

    Attributes
    ----------
    sentence
        The finding in one sentence.
    numbers
        In the order of the page.
    tables
        Further detail.
    notes
        Paragraphs: artefacts of the published figure, settings that were not published, what differs and why.
    """

    sentence: str
    numbers: Sequence[Number]
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One published figure or claim.

    Attributes
    ----------
    name
        As on the command line: ``tfsvm-fig5``.
    title, about
        A line, and a paragraph on what is computed with which settings.
    paper
        Where it was published.
    cases
        In the order of the page.
    trials
        The published number of trials of each case.
    first_seed
        Seed of the first trial; the others follow.
    chunk
        Trials that advance together. A trial gives the same numbers whatever its chunk.
    scan
        None: every trial counts. Otherwise trials are drawn until ``trials`` of them have ``record["accepted"]``, and
        at most this many are; where more than the published number are wanted, the limit grows in proportion.
    run
        ``(case, seeds) -> one record for each seed``, in their order. Nothing random but by the seeds.
    summarize
        From the records of all cases, as they are after a round through JSON (NaN is None), ordered by case and seed.
    draw
        ``(figure, records)``: fills an empty figure.
    """

    name: str
    title: str
    about: str
    paper: Paper
    cases: Sequence[Case]
    trials: int
    run: Callable[[Case, Sequence[int]], list[Record]]
    summarize: Callable[[Sequence[Record]], Summary]
    draw: Callable[[Figure, Sequence[Record]], None]
    first_seed: int = 0
    chunk: int = 50
    scan: int | None = None
