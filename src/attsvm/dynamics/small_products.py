"""Compiled building blocks for small attention runs: products of small matrices, and exponentials.

numba unrolls a loop over a fixed number of entries before it could be vectorised, and a loop over an unknown number
pays for checks that cost more than a row of ten entries. So the one operation that all products are made of, a weighted
sum of rows, is written with vectors of LANE entries. Rows are padded with zeros to a multiple of LANE.

All that belongs to a run is in one flat array ``w``, at places that are unsigned: what is signed would be checked for
counting from the end, and what is in many arrays would be handed over at every call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from attsvm.dynamics.small_layout import LANE

__all__ = ["exponentials", "product"]


@intrinsic  # type: ignore[untyped-decorator]
def _sum_of_rows(typing: Any, w: Any, a: Any, step: Any, b: Any, stride: Any, count: Any, c: Any) -> Any:
    """``w[c : c + LANE] = sum over j < count of w[a + j step] * w[b + j stride : b + j stride + LANE]``."""
    return types.void(w, *(types.uint64,) * 6), _emit_sum_of_rows


def _emit_sum_of_rows(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """The instructions of a loop over j whose sum stays in a register."""
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    a, step, b, stride, count, c = args[1:]
    word, lane = a.type, ir.IntType(32)
    vector = ir.VectorType(ir.DoubleType(), LANE)
    undefined = ir.Constant(vector, ir.Undefined)

    def row(place: Any) -> Any:
        return builder.bitcast(builder.gep(data, [place]), vector.as_pointer())

    before = builder.block
    head, body, done = (builder.append_basic_block(name) for name in ("rows", "row", "summed"))
    builder.branch(head)
    builder.position_at_end(head)
    j, at, bt, total = (builder.phi(kind) for kind in (word, word, word, vector))
    builder.cbranch(builder.icmp_unsigned("<", j, count), body, done)
    builder.position_at_end(body)
    weight = builder.insert_element(undefined, builder.load(builder.gep(data, [at])), ir.Constant(lane, 0))
    weight = builder.shuffle_vector(weight, undefined, ir.Constant(ir.VectorType(lane, LANE), [0] * LANE))
    # "contract" allows one instruction for product and sum.
    term = builder.fmul(weight, builder.load(row(bt), align=8), flags=("contract",))
    new = (
        builder.add(j, ir.Constant(word, 1)),
        builder.add(at, step),
        builder.add(bt, stride),
        builder.fadd(total, term, flags=("contract",)),
    )
    builder.branch(head)
    first = (ir.Constant(word, 0), a, b, ir.Constant(vector, [0.0] * LANE))
    for value, start, follow in zip((j, at, bt, total), first, new, strict=True):
        value.add_incoming(start, before)
        value.add_incoming(follow, body)
    builder.position_at_end(done)
    builder.store(total, row(c), align=8)
    return context.get_dummy_value()


@njit(cache=True, nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def product(w, A, group, row, column, B, C, groups, p, q, width):  # type: ignore[no-untyped-def]
    """``C_g = A_g B_g`` inside ``w``: entry (i, j) of A_g is at ``A + g group + i row + j column``.

    ``B`` (groups, q, width) and ``C`` (groups, p, width) are contiguous; ``width`` is a multiple of LANE.
    """
    lanes = width // np.uint64(LANE)
    for g in range(groups):
        for i in range(p):
            a, b, c = A + g * group + i * row, B + g * q * width, C + (g * p + i) * width
            for _ in range(lanes):
                _sum_of_rows(w, a, column, b, width, q, c)
                b += np.uint64(LANE)
                c += np.uint64(LANE)


@njit(cache=True, nogil=True, fastmath={"contract"}, no_cpython_wrapper=True, no_cfunc_wrapper=True)
def exponentials(w, begin, end):  # type: ignore[no-untyped-def]
    """Replace the entries from ``begin`` to ``end``, none positive, by their exponentials, within an ulp; e^-700 is 0.

    A series on [-log(2)/2, log(2)/2]; unlike a call of the library for each, the loop runs on vector units.
    """
    for i in range(begin, end):
        low = w[i] < -700.0
        y = -700.0 if low else w[i]
        # Added to 1.5 * 2^52, a number is rounded to an integer, which is then in the last bits.
        shifted = y * 1.4426950408889634 + 6755399441055744.0
        k = shifted - 6755399441055744.0
        r = (y - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10
        s = 1.0 / 6227020800.0
        s = s * r + 1.0 / 479001600.0
        s = s * r + 1.0 / 39916800.0
        s = s * r + 1.0 / 3628800.0
        s = s * r + 1.0 / 362880.0
        s = s * r + 1.0 / 40320.0
        s = s * r + 1.0 / 5040.0
        s = s * r + 1.0 / 720.0
        s = s * r + 1.0 / 120.0
        s = s * r + 1.0 / 24.0
        s = s * r + 1.0 / 6.0
        s = s * r + 0.5
        s = s * r + 1.0
        s = s * r + 1.0
        power = (np.float64(shifted).view(np.int64) + 1023) << 52
        w[i] = 0.0 if low else s * np.int64(power).view(np.float64)
