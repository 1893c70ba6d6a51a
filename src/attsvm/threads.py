"""One thread for small work: two threads that wait for each other can cost more than they give."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["one_thread", "threads_for"]

SMALL = 2e7
"""Operations of one step below which a second thread does not pay."""


@contextlib.contextmanager
def threads_for(operations: float) -> Iterator[None]:
    """Run the block on one torch thread when a step of it takes fewer than about 2e7 operations."""
    if operations >= SMALL:
        yield
    else:
        with one_thread():
            yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run the block on one torch thread; other Python threads keep theirs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
