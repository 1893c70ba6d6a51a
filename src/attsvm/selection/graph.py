"""The token-priority graph of next-token prediction: which tokens beat which, and which stay together.

One directed graph for each last token k. A training sequence that ends in k and has the label y says that y comes
before every other token of the sequence; edges ``y -> j``. Tokens that reach each other, a strongly connected
component, can only share attention; between components the order is strict.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from attsvm.errors import InvalidInputError
from attsvm.selection.arrays import Array, as_index

__all__ = ["TokenPriorityGraph", "strongly_connected_components"]

Component = tuple[int, ...]


class TokenPriorityGraph:
    r"""For every last token k, the priorities between the tokens that the training sequences tell.

    Parameters
    ----------
    sequences
        n sequences of token ids, of any lengths >= 1, or an array (n, T). The last id of each is its query. Ids may
        repeat.
    labels
        (n,) the id that follows each sequence; it must occur in the sequence.
    d_vocab
        Number of token ids; ids must be below it. Default: no bound.

    Raises
    ------
    InvalidInputError
        If there is no sequence or an empty one, an id is out of range, or a label does not occur in its sequence.

    Notes
    -----
    For each sample with last token k and label y, the graph of k has an edge from y to each other token of the
    sequence. Components are found by Tarjan's algorithm without recursion, in time linear in the number of edges.
    Components of different last tokens have nothing to do with each other.

    References
    ----------
    Li, Huang, Ildiz, Rawat, Oymak. "Mechanics of Next Token Prediction with Self-Attention", 2024. arXiv:2403.08081.

    Examples
    --------
    >>> graph = TokenPriorityGraph([[0, 1, 2], [1, 0, 2], [1, 0, 2]], labels=[0, 0, 1])
    >>> graph.components(2)
    ((0, 1), (2,))
    >>> graph.precedes(2, 1, 2), graph.is_acyclic
    (True, False)
    """

    def __init__(self, sequences: Array, labels: Array, *, d_vocab: int | None = None) -> None:
        where = "TokenPriorityGraph"
        self.sequences: tuple[tuple[int, ...], ...] = _read_sequences(sequences, d_vocab, where)
        """The sequences, as ids."""
        self.labels: tuple[int, ...] = _read_labels(labels, self.sequences, where)
        """The label of each sequence."""
        self.d_vocab = d_vocab
        successors: dict[int, dict[int, set[int]]] = {}
        for ids, label in zip(self.sequences, self.labels):
            graph = successors.setdefault(ids[-1], {})
            for token in ids:
                graph.setdefault(token, set())
            graph[label].update(set(ids) - {label})
        self._successors = {k: {i: sorted(after) for i, after in graph.items()} for k, graph in successors.items()}
        self._components = {k: strongly_connected_components(graph) for k, graph in self._successors.items()}
        self._place = {
            k: {token: place for place, component in enumerate(components) for token in component}
            for k, components in self._components.items()
        }

    @property
    def last_tokens(self) -> tuple[int, ...]:
        """The ids that some sequence ends with, in increasing order."""
        return tuple(sorted(self._successors))

    @property
    def is_acyclic(self) -> bool:
        """Whether every component is a single token: then attention selects one token everywhere."""
        return all(len(component) == 1 for components in self._components.values() for component in components)

    def edges(self, last: int) -> tuple[tuple[int, int], ...]:
        """The edges (label, other token) of the graph of a last token, sorted; none for an id that ends no sequence.

        Parameters
        ----------
        last
            The last token k.
        """
        graph = self._successors.get(self._id(last, "last"), {})
        return tuple(sorted((i, j) for i, after in graph.items() for j in after))

    def components(self, last: int) -> tuple[Component, ...]:
        """The strongly connected components of the graph of a last token, in priority order: winners first.

        No edge leads from a component to an earlier one. Tokens that occur in no sequence that ends in ``last`` are
        not listed.

        Parameters
        ----------
        last
            The last token k.
        """
        return tuple(self._components.get(self._id(last, "last"), ()))

    def component(self, last: int, token: int) -> Component:
        """The component that holds a token; ``(token,)`` if it occurs in no sequence that ends in ``last``.

        Parameters
        ----------
        last
            The last token k.
        token
            A token id.
        """
        token = self._id(token, "token")
        place = self._place.get(self._id(last, "last"), {}).get(token)
        return (token,) if place is None else self._components[last][place]

    def same_component(self, last: int, i: int, j: int) -> bool:
        """Whether i and j reach each other in the graph of a last token; every token reaches itself.

        Parameters
        ----------
        last
            The last token k.
        i, j
            Token ids.
        """
        return self._id(j, "j") in self.component(last, self._id(i, "i"))

    def precedes(self, last: int, i: int, j: int) -> bool:
        """Whether i has strict priority over j: i reaches j, and j does not reach i.

        Parameters
        ----------
        last
            The last token k.
        i, j
            Token ids.
        """
        if self.same_component(last, i, j):
            return False
        graph = self._successors.get(last, {})
        seen, waiting = {i}, [i]
        while waiting:
            for token in graph.get(waiting.pop(), ()):
                if token == j:
                    return True
                if token not in seen:
                    seen.add(token)
                    waiting.append(token)
        return False

    def _id(self, value: Any, name: str) -> int:
        valid = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not (valid and value >= 0 and (self.d_vocab is None or value < self.d_vocab)):
            raise InvalidInputError(
                f"TokenPriorityGraph: {name} must be a token id {_range(self.d_vocab)}, got {value!r}."
            )
        return int(value)

    def __repr__(self) -> str:
        tokens = sum(len(graph) for graph in self._successors.values())
        components = sum(map(len, self._components.values()))
        return (
            f"TokenPriorityGraph({len(self.sequences)} sequences, {len(self._successors)} last tokens, "
            f"{tokens} nodes in {components} components)"
        )


def strongly_connected_components(successors: Mapping[int, Iterable[int]]) -> list[Component]:
    """Strongly connected components in topological order: no edge leads to an earlier one. Ids in each are sorted.

    Parameters
    ----------
    successors
        For each node, the nodes that its edges lead to; all of them must be keys. The order of the keys and of the
        edges decides between topological orders.

    Notes
    -----
    A depth-first search that keeps its own stack of half-read edge lists, so that depth is not bounded by recursion.

    References
    ----------
    Tarjan. "Depth-first search and linear graph algorithms", 1972.
    """
    number: dict[int, int] = {}  # in order of discovery
    low: dict[int, int] = {}  # the smallest number of an open node that is reached through the subtree
    open_nodes: list[int] = []
    is_open: set[int] = set()
    found: list[Component] = []
    for root in successors:
        if root in number:
            continue
        path = [(root, iter(successors[root]))]
        while path:
            node, edges = path[-1]
            if node not in number:
                number[node] = low[node] = len(number)
                open_nodes.append(node)
                is_open.add(node)
            descend = None
            for other in edges:
                if other not in number:
                    descend = other
                    break
                if other in is_open:
                    low[node] = min(low[node], number[other])
            if descend is not None:
                path.append((descend, iter(successors[descend])))
                continue
            path.pop()
            if path:
                parent = path[-1][0]
                low[parent] = min(low[parent], low[node])
            if low[node] == number[node]:
                component = []
                while node in is_open:
                    component.append(open_nodes.pop())
                    is_open.remove(component[-1])
                found.append(tuple(sorted(component)))
    return found[::-1]


def _range(d_vocab: int | None) -> str:
    return ">= 0" if d_vocab is None else f"in [0, {d_vocab})"


def _read_sequences(sequences: Array, d_vocab: int | None, where: str) -> tuple[tuple[int, ...], ...]:
    """Sequences of ids, each with at least one."""
    if d_vocab is not None and not (isinstance(d_vocab, int) and not isinstance(d_vocab, bool) and d_vocab >= 1):
        raise InvalidInputError(f"{where}: d_vocab must be an integer >= 1 or None, got {d_vocab!r}.")
    try:
        items = list(sequences)
    except TypeError as error:
        raise InvalidInputError(f"{where}: sequences must be a list of sequences of ids, or (n, T).") from error
    if not items:
        raise InvalidInputError(f"{where}: sequences must hold at least one sequence, got none.")
    found = []
    for place, item in enumerate(items):
        if hasattr(item, "__len__") and len(item) == 0:
            raise InvalidInputError(f"{where}: sequences[{place}] is empty; every sequence needs a token.")
        ids = as_index(item, f"sequences[{place}]", where=where, device=torch.device("cpu"))
        if ids.ndim != 1:
            raise InvalidInputError(
                f"{where}: sequences[{place}] must have one axis, the ids of one sequence, got {tuple(ids.shape)}."
            )
        bad = (ids < 0) | (ids >= (d_vocab if d_vocab is not None else torch.iinfo(torch.int64).max))
        if bool(bad.any()):
            raise InvalidInputError(
                f"{where}: sequences must hold token ids {_range(d_vocab)}, got {int(ids[bad][0])} at sequence "
                f"{place}. Ids are zero-based."
            )
        found.append(tuple(ids.tolist()))
    return tuple(found)


def _read_labels(labels: Array, sequences: tuple[tuple[int, ...], ...], where: str) -> tuple[int, ...]:
    """One label for each sequence, out of its ids."""
    values = as_index(labels, "labels", where=where, device=torch.device("cpu"))
    if tuple(values.shape) != (len(sequences),):
        raise InvalidInputError(
            f"{where}: labels must hold one id for each of the {len(sequences)} sequences, got {tuple(values.shape)}."
        )
    read = tuple(values.tolist())
    for place, (label, ids) in enumerate(zip(read, sequences)):
        if label not in ids:
            raise InvalidInputError(
                f"{where}: labels must occur in their sequences, label {label} does not occur in sequence {place}."
            )
    return read
