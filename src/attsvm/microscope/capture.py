"""What every attention module of a pretrained model computes, heard while the model computes its usual output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from attsvm.errors import AttSVMError, InvalidInputError, UnsupportedError
from attsvm.microscope.calls import AttentionCall, Kind, ModuleInfo, Side
from attsvm.microscope.hooks import hook_ears, hook_modules
from attsvm.microscope.interface import interface_ear, interface_modules
from attsvm.microscope.listening import Listener, evaluating
from attsvm.microscope.probe import example_inputs
from attsvm.microscope.reasons import is_unsupported, why_unsupported

__all__ = ["attention_modules", "captured", "overheard", "working_inputs"]


@dataclass(frozen=True)
class _Seen:
    """What a model was seen to do, which modules it had then, and on what it ran."""

    state: tuple[int, ...]
    infos: tuple[ModuleInfo, ...]
    inputs: dict[str, Any]


_SEEN: WeakKeyDictionary[nn.Module, _Seen] = WeakKeyDictionary()
_LOCKS: WeakKeyDictionary[nn.Module, AbstractContextManager[bool]] = WeakKeyDictionary()


def attention_modules(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> list[ModuleInfo]:
    """The attention modules of a model, in the order in which it runs them.

    They are seen by running the model on a few tokens (or one small picture): no list of families is needed.

    Parameters
    ----------
    model
        A transformers model. It is left as it is.
    inputs
        Keyword arguments for that run; by default the smallest that the model takes. Texts of an encoder-decoder must
        be of different lengths.

    Returns
    -------
    list of ModuleInfo
        One for each run of a module in a forward pass; where one module is several layers (ALBERT), the later runs
        have names with ``@1``, ``@2``.

    Raises
    ------
    UnsupportedError
        If nothing in the model attends in a way that can be heard; the message says why and what to do.
    InvalidInputError
        If ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"attention_modules: model must be a torch.nn.Module, got {type(model).__name__}.")
    return list(_seen(model, inputs).infos)


def working_inputs(model: nn.Module) -> dict[str, Any]:
    """The inputs on which :func:`attention_modules` saw a model run."""
    return dict(_seen(model, None).inputs)


def _seen(model: nn.Module, inputs: Mapping[str, Any] | None) -> _Seen:
    state = tuple(id(module) for module in model.modules())
    seen = _SEEN.get(model)
    if inputs is not None or seen is None or seen.state != state:
        tried = [dict(inputs)] if inputs is not None else list(example_inputs(model))
        for index, given in enumerate(tried):
            try:
                seen = _Seen(state, _sorted_out(_run_once(model, given)), given)
                break
            except _RunError:
                if index == len(tried) - 1:
                    raise
        assert seen is not None
        _SEEN[model] = seen
    return seen


@contextmanager
def captured(
    model: nn.Module,
    on_call: Callable[[AttentionCall], None],
    *,
    modules: Collection[str] | None = None,
    inputs_too: bool = False,
) -> Iterator[None]:
    """Hear what every attention module computes, while the model computes its usual output.

    Parameters
    ----------
    model
        A transformers model. While the context is open its configurations name another attention implementation,
        which calls the usual one; afterwards, also after an exception, everything is as before. Threads that capture
        the same model wait for each other.
    on_call
        Receives one :class:`~attsvm.microscope.calls.AttentionCall` for each module and forward pass, in order. Its
        tensors are the model's own, not copies: reduce them, and keep nothing of size heads x queries x keys.
    modules
        Names of the modules to hear; by default all of :func:`attention_modules`.
    inputs_too
        Whether calls have ``query_input`` and ``key_input``: the hidden states that the module was given for its
        queries and keys, after a norm that precedes the module.

    Yields
    ------
    None
        Run the model inside, as often as needed.

    Raises
    ------
    UnsupportedError
        See :func:`attention_modules`.
    InvalidInputError
        If a name is not that of an attention module.

    Examples
    --------
    >>> with captured(model, lambda call: print(call.info.labels)):  # doctest: +SKIP
    ...     model(**inputs)
    """
    infos = {info.name: info for info in attention_modules(model)}
    strange = sorted(set(modules or ()) - infos.keys())
    if strange:
        raise InvalidInputError(
            f"captured: modules must be names of attention modules such as {next(iter(infos))!r}, got {strange[0]!r}."
        )
    wanted = infos.keys() if modules is None else set(modules)

    def heard(name: str, call: AttentionCall) -> None:
        if name not in infos:
            raise UnsupportedError(
                f"captured: model must run the modules that a first short run showed, got a call of {name}. "
                "Hint: attention_modules(model, inputs) with inputs that show all of them."
            )
        on_call(replace(call, info=infos[name]))

    with overheard(model, heard, wants=lambda name: name in wanted or name not in infos, inputs_too=inputs_too):
        yield


@contextmanager
def overheard(
    model: nn.Module,
    heard: Callable[[str, AttentionCall], None],
    *,
    wants: Callable[[str], bool] = lambda name: True,
    inputs_too: bool = False,
) -> Iterator[None]:
    """Hear modules of which it is not known yet what they are: ``info`` has neither kind nor layer.

    Parameters
    ----------
    model
        A transformers model.
    heard
        Receives the name of the module's run and the call.
    wants
        Whether a name is of interest.
    inputs_too
        As in :func:`captured`.

    Yields
    ------
    None
        Run the model inside.
    """
    listener = Listener({id(module): name for name, module in model.named_modules()}, heard, wants)
    # Threads take turns: what one found on a model and puts back must not be what another has put there meanwhile.
    with _LOCKS.setdefault(model, RLock()):
        handles = [model.register_forward_pre_hook(lambda *_: listener.begin())]
        if inputs_too:
            for _, module in [*interface_modules(model), *hook_modules(model)]:
                handles.append(module.register_forward_pre_hook(listener.note_inputs, with_kwargs=True))
        try:
            with interface_ear(model, listener), hook_ears(model, listener):
                yield
        finally:
            for handle in handles:
                handle.remove()


# ------------------------------------------------------------------------------------------------------- the first run


class _RunError(UnsupportedError):
    """The model did not take these inputs."""


def _run_once(model: nn.Module, given: Mapping[str, Any]) -> list[tuple[AttentionCall, bool]]:
    """All calls of one short forward pass, without their large tensors, and whether each is causal."""
    if is_unsupported(model) or not (interface_modules(model) or hook_modules(model)):
        raise UnsupportedError(why_unsupported(model))
    calls: list[tuple[AttentionCall, bool]] = []

    def heard(name: str, call: AttentionCall) -> None:
        calls.append((replace(call, mask=None, offsets=None), _is_causal(call)))

    try:
        with torch.no_grad(), evaluating(model), overheard(model, heard, inputs_too=True):
            model(**given)
    except AttSVMError:
        raise
    except Exception as error:
        raise _RunError(
            f"attention_modules: model must run on {', '.join(given) or 'no inputs'}, got {type(error).__name__} "
            f"({_first_line(error)}). Hint: attention_modules(model, inputs) with inputs that it takes."
        ) from error
    batch_sizes = {len(value) for value in given.values() if isinstance(value, torch.Tensor)}
    windows = any(len(call.q) not in batch_sizes for call, _ in calls)
    if windows or not calls:
        raise UnsupportedError(why_unsupported(model, windows=windows))
    return calls


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


def _is_causal(call: AttentionCall) -> bool:
    """No query may attend to what comes after it."""
    if call.mask is None or call.query_length != call.key_length or call.query_length < 2:
        return False
    whole = call.mask.expand(*call.mask.shape[:-2], call.query_length, call.key_length)
    return not bool(whole.triu(1).any())


def _is_cross(call: AttentionCall) -> bool:
    """The keys are of another text: it has another length, or the module was given it apart."""
    return call.query_length != call.key_length or call.query_input is not call.key_input


def _sorted_out(calls: list[tuple[AttentionCall, bool]]) -> tuple[ModuleInfo, ...]:
    """Kinds, layers within each kind, and sides of the calls of a forward pass."""
    crosses = {(call.query_length, call.key_length) for call, _ in calls if _is_cross(call)}
    kinds: list[tuple[AttentionCall, Kind, Side]] = []
    for call, causal in calls:
        length = call.query_length
        # The decoder's own attention need not be causal (object detection): it has the length of its queries.
        decodes = causal or any(length == queries != keys for queries, keys in crosses)
        kind: Kind = "cross" if _is_cross(call) else "decoder" if decodes else "encoder"
        kinds.append((call, kind, "target" if crosses and kind != "encoder" else "source"))
    layers: Counter[Kind] = Counter()
    prefixed = len({kind for _, kind, _ in kinds}) > 1
    infos = []
    for call, kind, side in kinds:
        infos.append(
            replace(
                call.info,
                kind=kind,
                layer=layers[kind],
                query_side=side,
                key_side="source" if kind == "cross" else side,
                prefixed=prefixed,
            )
        )
        layers[kind] += 1
    return tuple(infos)
