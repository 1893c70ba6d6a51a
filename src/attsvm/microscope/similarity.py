"""How often heads select the same key."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from attsvm.errors import InvalidInputError

__all__ = ["agreement"]


def agreement(selected: npt.ArrayLike) -> npt.NDArray[np.float32]:
    r"""Share of queries for which two heads select the same key.

    Over the queries for which both heads select something,

    $$A_{gh} = \frac{|\{i : a_{gi} = a_{hi} \ge 0\}|}{|\{i : a_{gi} \ge 0, a_{hi} \ge 0\}|} .$$

    Parameters
    ----------
    selected
        (heads, queries): index $a_{hi}$ of the key that head h selects for query i, -1 for none. All heads are asked
        the same queries about the same keys.

    Returns
    -------
    ndarray
        (heads, heads) float32, symmetric, 1 on the diagonal; NaN where two heads have no query in common.

    Examples
    --------
    >>> agreement([[0, 1, 2, -1], [0, 1, 1, 3]]).round(3)
    array([[1.   , 0.667],
           [0.667, 1.   ]], dtype=float32)
    """
    keys: npt.NDArray[Any] = np.asarray(selected)
    if keys.ndim != 2 or keys.dtype.kind not in "iu":
        raise InvalidInputError(
            f"agreement: selected must be whole numbers (heads, queries), got {keys.dtype} {keys.shape}."
        )
    chosen = keys >= 0
    known = chosen.astype(np.float64)
    both = known @ known.T
    # One head against the ones after it: memory stays that of the argument.
    equal = np.zeros_like(both)
    for head in range(len(keys)):
        equal[head, head:] = ((keys[head:] == keys[head]) & chosen[head]).sum(-1)
    equal += np.triu(equal, 1).T
    shares = np.divide(equal, both, out=np.full_like(both, np.nan), where=both > 0)
    return shares.astype(np.float32)
