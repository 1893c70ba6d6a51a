"""Keys and values of the positions seen so far, so that each new token costs one position and not all of them."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from attsvm.errors import InvalidInputError

__all__ = ["KeyValueCache"]


class KeyValueCache:
    """Keys and values (B, Hkv, T, d_head) of every layer, grown in place.

    One cache serves the self-attention of all layers of one decoder. Cross-attention has a cache of its own, in which
    the keys and values of the encoded sequence are put once and then only read.

    Parameters
    ----------
    capacity
        Positions to make room for at once; it grows (doubling) when more come. Give prompt + new tokens where known.

    Notes
    -----
    Under ``torch.no_grad`` or ``torch.inference_mode`` a new position is written into room kept for it: no copy of the
    past, but for one when the room doubles. Where gradients may be recorded the tensors are concatenated instead:
    autograd can follow that, and what it has saved for the backward pass is not written over.

    Examples
    --------
    >>> cache = KeyValueCache()
    >>> k, v = cache.update(0, torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    >>> k, v = cache.update(0, torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4))
    >>> tuple(k.shape), cache.length
    ((1, 2, 4, 4), 4)
    """

    def __init__(self, capacity: int = 0) -> None:
        if capacity < 0:
            raise InvalidInputError(f"KeyValueCache: capacity must be >= 0, got {capacity}.")
        self._capacity = capacity
        self._rooms: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._lengths: dict[Hashable, int] = {}

    @property
    def length(self) -> int:
        """Positions held, by the layer that was filled first; all layers agree between two forward passes."""
        return next(iter(self._lengths.values()), 0)

    def length_of(self, layer: Hashable) -> int:
        """Positions held by one layer."""
        return self._lengths.get(layer, 0)

    def __contains__(self, layer: Hashable) -> bool:
        return layer in self._rooms

    def __getitem__(self, layer: Hashable) -> tuple[Tensor, Tensor]:
        if layer not in self._rooms:
            raise InvalidInputError(f"KeyValueCache: layer must be one that was updated, got {layer!r}.")
        keys, values = self._rooms[layer]
        length = self._lengths[layer]
        return keys[:, :, :length], values[:, :, :length]

    def update(self, layer: Hashable, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k (B, Hkv, T, d_head) and v of new positions; return those of all positions so far."""
        if k.ndim != 4 or v.ndim != 4 or k.shape[:3] != v.shape[:3]:
            raise InvalidInputError(
                "KeyValueCache: k and v must be (B, Hkv, T, d_head) of one batch, head count and length, "
                f"got {tuple(k.shape)} and {tuple(v.shape)}."
            )
        begin = self._lengths.get(layer, 0)
        end = begin + k.shape[2]
        if begin:
            self._check_like(layer, k, v)
        if torch.is_grad_enabled():
            self._rooms[layer] = self._joined(layer, k, v)
        else:
            rooms = self._rooms.get(layer)
            if rooms is None or not _writable(rooms[0], end):
                rooms = self._larger(layer, k, v, end)
            rooms[0][:, :, begin:end] = k
            rooms[1][:, :, begin:end] = v
        self._lengths[layer] = end
        return self[layer]

    def reorder(self, index: Tensor) -> None:
        """Row b of the batch becomes what row ``index[b]`` was, for beams; the batch takes the length of index."""
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise InvalidInputError(
                f"KeyValueCache: index must hold batch rows, one axis of integers, got {index.dtype} of shape "
                f"{tuple(index.shape)}."
            )
        for layer in self._rooms:
            keys, values = self._rooms[layer]
            self._rooms[layer] = (keys.index_select(0, index), values.index_select(0, index))

    def truncate(self, length: int, *, keep_room: bool = False) -> None:
        """Forget the positions from ``length`` on.

        Parameters
        ----------
        length
            Positions that remain.
        keep_room
            Let the next update write over what is forgotten, without a copy of what remains: for callers who no longer
            use what :meth:`update` returned. By default it is left alone.

        Raises
        ------
        InvalidInputError
            If ``length`` is not between 0 and the positions held.
        """
        if length < 0 or length > self.length:
            raise InvalidInputError(f"KeyValueCache: length must be in [0, {self.length}], got {length}.")
        for layer, (keys, values) in self._rooms.items():
            if not keep_room:
                # With no place left in what remains, the next update makes new rooms.
                self._rooms[layer] = (keys[:, :, :length], values[:, :, :length])
            self._lengths[layer] = length

    def _check_like(self, layer: Hashable, k: Tensor, v: Tensor) -> None:
        for name, new, held in zip("kv", (k, v), self._rooms[layer]):
            if held.shape[:2] != new.shape[:2] or held.shape[3] != new.shape[3] or held.dtype != new.dtype:
                raise InvalidInputError(
                    f"KeyValueCache: {name} must continue layer {layer!r}, {held.dtype} with batch {held.shape[0]}, "
                    f"{held.shape[1]} heads and d_head {held.shape[3]}, got {new.dtype} of shape {tuple(new.shape)}."
                )

    def _joined(self, layer: Hashable, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if not self._lengths.get(layer):
            return k, v
        keys, values = self[layer]
        return torch.cat([keys, k], 2), torch.cat([values, v], 2)

    def _larger(self, layer: Hashable, k: Tensor, v: Tensor, end: int) -> tuple[Tensor, Tensor]:
        room = max(self._capacity, end if layer not in self._rooms else 2 * end)
        rooms = (_empty(k, room), _empty(v, room))
        if layer in self._rooms:
            length = self._lengths[layer]
            for new, old in zip(rooms, self[layer]):
                new[:, :, :length] = old.detach()
        self._rooms[layer] = rooms
        return rooms


def _empty(x: Tensor, room: int) -> Tensor:
    return torch.empty((*x.shape[:2], room, x.shape[3]), dtype=x.dtype, device=x.device)


def _writable(room: Tensor, end: int) -> bool:
    """Whether there is place up to ``end`` in a tensor that may be written in place."""
    if torch.compiler.is_compiling():  # which knows nothing of inference mode
        return room.shape[2] >= end
    return room.shape[2] >= end and (not room.is_inference() or torch.is_inference_mode_enabled())
