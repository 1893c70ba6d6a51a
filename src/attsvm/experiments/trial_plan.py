"""Which trials a recipe needs, cut into chunks in a fixed order, and who computes which of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from attsvm.errors import InvalidInputError
from attsvm.experiments.processes import Processes
from attsvm.experiments.recipes import Case, Recipe, Record
from attsvm.experiments.trial_records import digest_of
from attsvm.records import dumps, package_versions

__all__ = ["Chunk", "Plan", "Shares"]

MAX_SEED = 2**31 - 1
"""Every generator of NumPy and torch takes seeds up to here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """Trials that are computed, and lost, together.

    Attributes
    ----------
    case
        Which case of the recipe, from 0.
    number
        Which chunk of the case, from 0.
    seeds
        One for each trial.
    """

    case: int
    number: int
    seeds: range


@dataclasses.dataclass(frozen=True)
class Plan:
    """The trials of a recipe with these settings.

    Attributes
    ----------
    recipe
        What is computed.
    wanted
        For each case, how many accepted trials.
    limits
        For each case, how many trials are drawn at most.
    first_seed
        Seed of the first trial of each case.
    """

    recipe: Recipe
    wanted: tuple[int, ...]
    limits: tuple[int, ...]
    first_seed: int

    @classmethod
    def checked(cls, recipe: Recipe, *, trials: int | None = None, seed: int | None = None) -> Plan:
        """The plan for these options; None is what the recipe says.

        Raises
        ------
        InvalidInputError
            If there are no trials, or the seeds leave the range that generators take.
        """
        if trials is not None and trials < 1:
            raise InvalidInputError(f"reproduce: --trials must be at least 1, got {trials}.")
        wanted = tuple(trials or case.trials or recipe.trials for case in recipe.cases)
        limits = tuple(_limit(recipe, case, count) for case, count in zip(recipe.cases, wanted, strict=True))
        first = recipe.first_seed if seed is None else seed
        last = first + max(limits) - 1
        if first < 0 or last > MAX_SEED:
            raise InvalidInputError(
                f"reproduce: --seed must be such that all seeds of {recipe.name} are in [0, {MAX_SEED}], "
                f"got {first} to {last}."
            )
        return cls(recipe, wanted, limits, first)

    @property
    def settings(self) -> dict[str, Any]:
        """What the records depend on, as JSON; runs of equal settings have equal records."""
        recipe = self.recipe
        cases = [
            {"name": case.name, "values": dict(case.values), "trials": wanted}
            for case, wanted in zip(recipe.cases, self.wanted, strict=True)
        ]
        settings = {
            "recipe": recipe.name,
            "cases": cases,
            "first_seed": self.first_seed,
            "chunk": recipe.chunk,
            "limits": None if recipe.scan is None else list(self.limits),
            "attsvm": package_versions().get("attsvm"),
        }
        plain: dict[str, Any] = json.loads(dumps(settings))
        return plain

    @property
    def digest(self) -> str:
        """A checksum of the settings."""
        return digest_of(dumps(self.settings))

    @property
    def total(self) -> int:
        """Accepted trials over all cases."""
        return sum(self.wanted)

    def chunks_of(self, case: int) -> int:
        """How many chunks a case has at most."""
        return -(-self.limits[case] // self.recipe.chunk)

    def chunk(self, case: int, number: int) -> Chunk:
        """One chunk; the last of a case may hold fewer trials."""
        size = self.recipe.chunk
        begin, end = number * size, min((number + 1) * size, self.limits[case])
        return Chunk(case=case, number=number, seeds=range(self.first_seed + begin, self.first_seed + end))

    def accepts(self, record: Record) -> bool:
        """Whether a trial counts."""
        return self.recipe.scan is None or bool(record.get("accepted"))

    def prefix(self, case: int, found: Mapping[int, Sequence[Record]]) -> list[Record]:
        """The records of a case up to the last that is wanted, from its chunks by their numbers.

        The shortest run of seeds with enough accepted trials: the same whatever else was computed.
        """
        records: list[Record] = []
        accepted = 0
        for number in range(self.chunks_of(case)):
            if accepted == self.wanted[case]:
                break
            for record in found[number]:
                records.append(record)
                accepted += self.accepts(record)
                if accepted == self.wanted[case]:
                    break
        return records


def _limit(recipe: Recipe, case: Case, wanted: int) -> int:
    """How many trials of a case are drawn at most."""
    if recipe.scan is None:
        return wanted
    published = case.trials or recipe.trials
    return max(recipe.scan, -(-recipe.scan * wanted // published))


class Shares:
    """Hands out the chunks, one at a time, to the workers of all processes.

    Within a case chunks are taken in order, so that what is computed beyond the wanted trials is little, and what
    comes before a finished chunk is finished in the end.

    Parameters
    ----------
    plan
        What is to be done.
    done
        Accepted trials of the chunks that an earlier part of the run has finished, by (case, number).
    processes
        Who shares the work; all count together.
    """

    def __init__(self, plan: Plan, done: Mapping[tuple[int, int], int], processes: Processes) -> None:
        self._plan, self._done, self._processes = plan, done, processes
        # A name of its own for every use of this class; all processes make the same uses in the same order.
        self._use = processes.next_use()
        cases = range(len(plan.recipe.cases))
        self._pending = [
            [number for number in range(plan.chunks_of(case)) if (case, number) not in done] for case in cases
        ]

    def next(self) -> Chunk | None:
        """The next chunk to compute; None when there is none left."""
        for speculate in (False, True):
            for case in range(len(self._pending)):
                chunk = self._claim(case, speculate)
                if chunk is not None:
                    return chunk
        return None

    def finished(self, chunk: Chunk, accepted: int) -> None:
        """Count a chunk that :meth:`next` gave."""
        self._count("accepted", chunk.case, accepted)
        self._count("finished", chunk.case, 1)

    def trials_done(self) -> int:
        """Accepted trials so far, those beyond the wanted left out; of all processes and all parts of the run."""
        have = [self._before(case, None) + self._count("accepted", case, 0) for case in range(len(self._pending))]
        return sum(min(one, wanted) for one, wanted in zip(have, self._plan.wanted, strict=True))

    def _claim(self, case: int, speculate: bool) -> Chunk | None:
        """The next chunk of a case, where it is needed.

        Without ``speculate``, where it would be needed even if all trials under way were accepted.
        """
        pending, wanted = self._pending[case], self._plan.wanted[case]
        # Read before the claim: what was finished by then comes before the claimed chunk, so the two may be added.
        accepted = self._count("accepted", case, 0)
        finished, claimed = (self._count(name, case, 0) for name in ("finished", "claimed"))
        if claimed >= len(pending):
            return None
        under_way = 0 if speculate else (claimed - finished) * self._plan.recipe.chunk
        if self._before(case, pending[claimed]) + accepted + under_way >= wanted:
            return None
        mine = self._count("claimed", case, 1) - 1
        if mine >= len(pending) or self._before(case, pending[mine]) + accepted >= wanted:
            return None
        return self._plan.chunk(case, pending[mine])

    def _before(self, case: int, number: int | None) -> int:
        """Accepted trials of the earlier part of the run in the chunks before ``number``; None for all."""
        return sum(
            accepted for (one, at), accepted in self._done.items() if one == case and (number is None or at < number)
        )

    def _count(self, name: str, case: int, amount: int) -> int:
        return self._processes.count(f"{self._use}-{name}-{case}", amount)
