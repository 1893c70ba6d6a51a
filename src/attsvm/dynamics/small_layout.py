"""Where everything about a small attention run is: sizes and places in one flat array, values in another.

``z`` holds sizes, then places in ``w``, then the token that each query attends to most; the names below are indices of
``z``. Compiled functions that are handed two arrays, and read from them what they need, cost nothing to call; and
places that are unsigned are not checked for counting from the end.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["LANE", "Floats", "Places", "room"]

Floats = NDArray[np.float64]
Places = NDArray[np.uint64]

LANE = 8
"""Rows are padded with zeros to a multiple of this."""

FULL, FACTORS, DIAGONAL = range(3)
"""Parameterisations."""

FIXED, QUADRATIC, RELU, TRAINED = range(4)
"""Heads."""

LOGISTIC, EXPONENTIAL, CORRELATION, SQUARED, LOGARITHM = range(5)
"""Losses."""

PLAIN, NORMALISED, POLYAK, MOMENTUM, ADAM, SIGN, MIRROR = range(7)
"""Optimisers."""

# Sizes: n, Q, N = n Q, T, d, r (entries of a query), m (columns of K), h (columns of the head's matrix), and the rows
# of the left tensor, which is kept transposed.
SEQUENCES, PER_SEQUENCE, QUERIES, TOKENS, ENTRIES, QUERY_ENTRIES, FACTOR_COLUMNS, HEAD_COLUMNS, LEFT_ROWS = range(9)
# d, T, m and h padded; the codes above.
WIDE_ENTRIES, WIDE_TOKENS, WIDE_FACTORS, WIDE_HEAD, KIND, HEAD, LOSS, RULE = range(9, 17)
# Sizes of the three tensors that may be trained.
LEFT_SIZE, RIGHT_SIZE, MATRIX_SIZE = range(17, 20)

# Places of the data. BIAS is the offset, -inf where not allowed; ACTIVE is 1 where something is allowed; BEST is the
# largest score. X_TURNED has the tokens as columns.
X, X_TURNED, Z, BIAS, SCORES, LABELS, ACTIVE, BEST, PENALTY = range(20, 29)
# The trained tensors: left (transposed), right, and the matrix (transposed) or vector of the head; their gradients;
# the means of these and of their squares over a scale, and the logarithm of that.
LEFT, RIGHT, MATRIX = range(29, 32)
LEFT_SLOPE, RIGHT_SLOPE, MATRIX_SLOPE = range(32, 35)
LEFT_MEAN, RIGHT_MEAN, MATRIX_MEAN = range(35, 38)
LEFT_SQUARE, RIGHT_SQUARE, MATRIX_SQUARE = range(38, 41)
LEFT_SCALE, RIGHT_SCALE, MATRIX_SCALE = range(41, 44)
# What a step passes through: W z; queries times Q, pulls times K, and K the other way round; weights of the tokens,
# and after them two ratios for each query; what attention puts out, and the head there.
KEYS, INNER, BACK, LEFT_TURNED, WEIGHTS, RATIOS, WEIGHTS_END, CHANCES, OUTPUT, HIDDEN, TILT, MATRIX_TURNED = range(
    44, 56
)
# For each query: log of the second probability over the first, the first, the signed output, the score of the first
# less that of attention over SCALE, and the slope of the loss as a factor and a power; and the sum of its tokens with
# the weights of the gradient.
GAP, PEAK, VALUE, LEAD, FACTOR, POWER, PULLS = range(56, 63)
# Numbers: logarithm of the scale of the weights, its exponential, logarithm of the scale of the slopes of the loss, how
# far the loss is above that of the best scores, over both scales.
LOG_SHIFT, SCALE, LOG_SLOPE, EXCESS = range(63, 67)
# The tokens that are attended to most, one for each query.
CHOSEN = 67


def room(
    *, n: int, Q: int, T: int, d: int, r: int, m: int, h: int, kind: int, head: int, loss: int, rule: int
) -> tuple[Floats, Places]:
    """Room for one run after the other: ``w`` and ``z``."""
    N, rows = n * Q, {FULL: r, FACTORS: m, DIAGONAL: 1}[kind]
    D, W, S, H = (-(-size // LANE) * LANE for size in (d, T, m, h))
    right = D if kind == DIAGONAL else r * S
    sizes = (n, Q, N, T, d, r, m, h, rows, D, W, S, H, kind, head, loss, rule, rows * D, right, h * D)
    tensors = (rows * D, right, h * D)
    rooms = (
        *(n * T * D, n * d * W, N * r, N * W, N * W, N, N, N, 1),
        *(tensors * 4),
        *(1, 1, 1),
        *(N * D, N * S, N * S, d * S, N * W, 2 * N, 0, N * W, N * D, N * H, N * D, d * H),
        *(N, N, N, N, N, N, N * D),
        *(1, 1, 1, 1),
    )
    # Every array begins where a vector of LANE entries is aligned.
    places = np.cumsum([0, *(-(-room // LANE) * LANE for room in rooms)])
    w = np.zeros(int(places[-1]) + LANE)
    w = w[-(w.ctypes.data // w.itemsize) % LANE :][: int(places[-1])]
    z = np.array([*sizes, *places[:-1], *(0,) * (N + 1)], dtype=np.uint64)
    z[CHOSEN] = CHOSEN + 1
    return w, z
