"""One job in several processes, as torchrun starts them: their group, and what they must agree on."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch

from attsvm.errors import AttSVMError, InvalidInputError

__all__ = ["LostProcessError", "Processes", "join_processes"]

T = TypeVar("T")

RESUME = "the same command with --resume goes on from the last checkpoint"

PATIENCE = 5.0
"""Seconds that process 0 waits for the others after a failure."""

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class LostProcessError(AttSVMError):
    """A process of the job ended before the others, or this one was told to end."""


class Processes:
    """The processes of this job, of which this is one.

    Parameters
    ----------
    rank, size
        Which of how many.
    group
        Their ``torch.distributed`` group; None for a process alone.
    store
        What the processes share besides the group, and keep when one of them is lost.
    command
        The command that the job runs.
    again
        How the job goes on after a loss, as the end of a sentence.

    Attributes
    ----------
    is_first
        Whether this process is the one that writes and prints.
    """

    def __init__(
        self,
        *,
        rank: int = 0,
        size: int = 1,
        group: Any = None,
        store: Any = None,
        command: str = "solve",
        again: str = RESUME,
    ) -> None:
        self.rank, self.size, self.group, self._store = rank, size, group, store
        self._lost = f"{command}: a process of the job was lost, or told to end, so all stop; {again}."
        self._stop = False
        self._uses = 0
        self._counters: collections.Counter[str] = collections.Counter()
        self._counting = threading.Lock()

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def may_tell(self) -> bool:
        """Whether this process is the first to say that the job has failed; only one is."""
        if self._store is None:
            return True
        key = f"attsvm-failed-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        try:
            mine = bool(self._store.add(key, 1) == 1)
            # The store ends with process 0, so that waits until the others have asked, or are not there to ask.
            end = time.monotonic() + PATIENCE
            while self.is_first and self._store.add(key, 0) < self.size and time.monotonic() < end:
                time.sleep(0.02)
        except RuntimeError:  # the store went with process 0
            return self.rank == 1
        return mine

    def together(self, work: Callable[[], T]) -> T:
        """Do ``work`` in every process; an error in one of them becomes the error of all."""
        if self.size == 1:
            return work()
        error: AttSVMError | None = None
        try:
            result = work()
        except AttSVMError as own:
            error = own
        failed = next((other for other in self.everywhere(error) if other is not None), None)
        if failed is not None:
            raise failed
        return result

    def everywhere(self, value: T) -> list[T]:
        """The small values of all processes, in order of their ranks."""
        if self.size == 1:
            return [value]
        from torch import distributed  # not part of every build of torch

        values: list[Any] = [None] * self.size
        with self._with_peers():
            distributed.all_gather_object(values, value, self.group)
        return values

    def count(self, name: str, amount: int) -> int:
        """Add to a counter that all processes share, and return its value; threads may count at the same time."""
        if self._store is None:
            with self._counting:
                self._counters[name] += amount
                return self._counters[name]
        with self._with_peers():
            return int(self._store.add(f"attsvm-{name}", amount))

    def next_use(self) -> int:
        """A number that is new at every call, and the same in all processes if all make the same calls."""
        self._uses += 1
        return self._uses

    def joined(self, mine: Any, total: int) -> Any:
        """An array whose rows ``rank::size`` each process has, whole and in order; in the first process only."""
        if self.size == 1:
            return mine
        from torch import distributed

        # Shares differ by one row at most; all send as many.
        padded = torch.zeros((-(-total // self.size), *mine.shape[1:]), dtype=torch.float64)
        padded[: len(mine)] = torch.as_tensor(mine)
        pieces = [torch.empty_like(padded) for _ in range(self.size)] if self.is_first else None
        with self._with_peers():
            distributed.gather(padded, pieces, dst=0, group=self.group)
        if pieces is None:
            return mine
        whole = np.empty((total, *mine.shape[1:]))
        for rank, piece in enumerate(pieces):
            whole[rank :: self.size] = piece[: len(range(rank, total, self.size))].numpy()
        return whole

    def heed_interrupt(self, *, together: bool) -> None:
        """Raise KeyboardInterrupt after Ctrl-C in this process, or ``together``, in all, once any of them got it.

        Where they stop together, all must call this at the same place: a process that left on its own would leave
        the others waiting for it.
        """
        if self.size == 1:
            return
        stop = self._stop
        if together:
            from torch import distributed

            flag = torch.tensor(float(stop))
            with self._with_peers():
                distributed.all_reduce(flag, distributed.ReduceOp.MAX, self.group)
            stop = bool(flag > 0)
        if stop:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Work in which the loss of a process is an AttSVMError, and Ctrl-C waits for :meth:`heed_interrupt`."""
        if self.size == 1:
            yield
            return
        with self._with_peers(), _handling({signal.SIGINT: self._on_interrupt, signal.SIGTERM: self._on_end}):
            yield

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._stop:  # asked twice
            raise KeyboardInterrupt
        self._stop = True

    def _on_end(self, number: int, frame: FrameType | None) -> None:
        """What torchrun sends to the rest when a process is lost."""
        raise LostProcessError(self._lost)

    @contextlib.contextmanager
    def _with_peers(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _is_of_network(error):
                raise
            raise LostProcessError(self._lost) from error


@contextlib.contextmanager
def join_processes(
    environment: Mapping[str, str] | None = None, *, command: str = "solve", again: str = RESUME
) -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did.

    Parameters
    ----------
    environment
        Where RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are looked up. Default: the process's own.
    command, again
        As for :class:`Processes`.

    Raises
    ------
    InvalidInputError
        If one of these variables is absent or not what it must be.
    AttSVMError
        If the processes do not find each other.
    """
    environment = os.environ if environment is None else environment
    size = environment.get("WORLD_SIZE", "1")
    if size == "1":
        yield Processes(command=command, again=again)
        return
    absent = [name for name in _NEEDED if name not in environment]
    wrong = [name for name in ("RANK", "WORLD_SIZE", "MASTER_PORT") if not environment.get(name, "0").isdecimal()]
    if absent or wrong:
        problem = f"{absent[0]} is not set" if absent else f"{wrong[0]} is {environment[wrong[0]]!r}"
        raise InvalidInputError(f"{command}: the variables {', '.join(_NEEDED)} must be those of torchrun; {problem}.")
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, number = next(rendezvous("env://"))
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=number)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise AttSVMError(f"{command}: the {size} processes of the job did not find each other ({reason}).") from error
    try:
        group = distributed.group.WORLD
        yield Processes(rank=rank, size=number, group=group, store=store, command=command, again=again)
    except LostProcessError:
        # Threads of the group that live until the interpreter ends now and then abort it. Those that still wait for a
        # lost process, or were interrupted, end with the process: to join them would be to wait too.
        raise
    except AttSVMError:
        distributed.destroy_process_group()
        raise
    distributed.destroy_process_group()


@contextlib.contextmanager
def _handling(handlers: Mapping[signal.Signals, Callable[[int, FrameType | None], None]]) -> Iterator[None]:
    """Handle signals, where this is the main thread, which alone may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_of_network(error: RuntimeError) -> bool:
    """Whether an error comes from talking to the other processes."""
    from torch import distributed

    return isinstance(error, distributed.DistError) or any(
        word in str(error) for word in ("gloo", "onnection", "peer", "Broken pipe")
    )
