"""One torch thread for a block, and only for the Python thread that runs it."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from attsvm.threads import SMALL, one_thread, threads_for


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_one_thread_inside_and_as_before_outside() -> None:
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_put_back_after_an_error() -> None:
    with pytest.raises(KeyError), one_thread():
        raise KeyError
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("operations", "threads"), [(SMALL - 1, 1), (SMALL, 2), (1e12, 2)])
def test_small_work_gets_one_thread(operations: float, threads: int) -> None:
    with threads_for(operations):
        assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == 2


def test_other_python_threads_keep_theirs() -> None:
    inside, leave, seen = threading.Event(), threading.Event(), []

    def work() -> None:
        torch.set_num_threads(2)
        with one_thread():
            inside.set()
            leave.wait(10)
            seen.append(torch.get_num_threads())

    worker = threading.Thread(target=work)
    worker.start()
    assert inside.wait(10)
    here = torch.get_num_threads()
    leave.set()
    worker.join()
    assert (here, seen) == (2, [1])
