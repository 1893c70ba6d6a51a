"""The measurements of ``attsvm compare-rnn``: four models of about equal parameters, timed and taught to copy.

An LSTM, an LSTM encoder-decoder, the same with additive attention, and a causal transformer. The encoder-decoders take
the first part of a sequence as source and the rest as target.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from attsvm.attention.cache import KeyValueCache
from attsvm.errors import InvalidInputError, UnsupportedError
from attsvm.models.decoder import Decoder, DecoderConfig
from attsvm.models.recurrent import LSTMConfig, LSTMLanguageModel, LSTMSeq2Seq, LSTMSeq2SeqConfig
from attsvm.threads import one_thread

__all__ = ["MODELS", "CompareConfig", "copy_accuracy", "copy_batch", "make_model", "time_models"]

MODELS = {
    "lstm": "LSTM",
    "lstm-seq2seq": "LSTM encoder-decoder",
    "lstm-attention": "LSTM with attention",
    "transformer": "Transformer",
}
"""What is compared, with the name for people."""

TRIED = 512
"""Fresh sequences that the accuracy is measured on."""

SHORTEST = 0.02
"""Seconds that one timing lasts at least; faster passes are repeated within it."""

KEPT = 30_000_000
"""Bytes of the largest block that the C library on Linux keeps for later (its limit is 32 MiB)."""

Model: TypeAlias = LSTMLanguageModel | LSTMSeq2Seq | Decoder


class CompareConfig(BaseModel):
    """Settings of ``attsvm compare-rnn``; a run folder keeps them in ``config.json``.

    Attributes
    ----------
    lengths
        Tokens of the sequences that are timed.
    distances
        Steps from a token to its copy; at least ``payload`` + 1.
    seeds
        Trainings of each model at each distance.
    d_model, timed_d_model
        Width of the transformer that learns to copy, and of the one that is timed.
    n_layers, n_heads
        Its other sizes. The other models get the width that gives about as many parameters.
    payload, symbols
        Tokens to copy in each sequence, and how many kinds there are.
    steps, batch_size, learning_rate
        Of each training (Adam).
    timed_steps, repeats
        Tokens in each timing of one token at a time, and timings, of which the shortest counts: the least disturbed.
    seed
        The first seed.
    device
        ``cpu`` or ``cuda``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    lengths: tuple[int, ...] = Field(default=(128, 256, 512, 1024, 2048, 4096), min_length=2)
    distances: tuple[int, ...] = Field(default=(8, 16, 32, 64, 128), min_length=2)
    seeds: int = Field(default=3, ge=1)
    d_model: int = Field(default=64, ge=4)
    timed_d_model: int = Field(default=256, ge=4)
    n_layers: int = Field(default=2, ge=1)
    n_heads: int = Field(default=4, ge=1)
    payload: int = Field(default=4, ge=1)
    symbols: int = Field(default=16, ge=2)
    steps: int = Field(default=300, ge=1)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0, allow_inf_nan=False)
    timed_steps: int = Field(default=16, ge=1)
    repeats: int = Field(default=5, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**62)
    device: Literal["cpu", "cuda"] = "cpu"

    @classmethod
    def checked(cls, **values: Any) -> CompareConfig:
        """Build a configuration; raises InvalidInputError with one sentence for the first bad value."""
        try:
            config = cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]).replace("_", "-")
            wanted = first["msg"].replace("Input should be", "must be")
            raise InvalidInputError(f"compare-rnn: --{name} {wanted}, got {first['input']!r}.") from error
        for name, least in (("lengths", 2), ("distances", config.payload + 1)):
            numbers = getattr(config, name)
            if min(numbers) < least or list(numbers) != sorted(set(numbers)):
                given = ",".join(map(str, numbers))
                raise InvalidInputError(f"compare-rnn: --{name} must rise from at least {least}, got {given}.")
        for name in ("d_model", "timed_d_model"):
            width, n_heads = getattr(config, name), config.n_heads
            if width % (2 * n_heads):
                option = name.replace("_", "-")
                raise InvalidInputError(
                    f"compare-rnn: --{option} must be a multiple of {2 * n_heads}, twice the heads, got {width}."
                )
        if config.device == "cuda" and not torch.cuda.is_available():
            raise UnsupportedError("compare-rnn: --device cuda needs a GPU, and torch finds none.")
        return config

    @classmethod
    def quick(cls) -> dict[str, Any]:
        """Settings of a run that takes a few seconds and shows only that all works."""
        return {
            "lengths": (16, 32),
            "distances": (6, 12),
            "seeds": 2,
            "d_model": 16,
            "timed_d_model": 16,
            "n_heads": 2,
            "steps": 10,
            "batch_size": 8,
            "timed_steps": 2,
            "repeats": 1,
        }


def make_model(config: CompareConfig, name: str, generator: torch.Generator, *, d_model: int, n_ctx: int) -> Model:
    """Make a model of :data:`MODELS`, with about the parameters of the transformer of width ``d_model``, on the device.

    Its vocabulary is the symbols, a blank and a cue. ``n_ctx`` is the longest sequence, which only the transformer
    has to know. The start values come from the generator.
    """
    d_vocab = config.symbols + 2
    transformer = DecoderConfig(
        d_vocab=d_vocab,
        d_model=d_model,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        d_mlp=4 * d_model,
        n_ctx=n_ctx,
        positions="rotary",  # no table that grows with the context
        tied=False,
    )

    def of_width(width: int) -> LSTMConfig | LSTMSeq2SeqConfig:
        if name == "lstm":
            return LSTMConfig(d_vocab=d_vocab, d_model=width)
        return LSTMSeq2SeqConfig(d_vocab=d_vocab, d_model=width, attention=name == "lstm-attention")

    width = min(range(1, 16 * d_model), key=lambda width: abs(of_width(width).n_parameters - transformer.n_parameters))
    chosen = transformer if name == "transformer" else of_width(width)
    with torch.random.fork_rng(
        devices=[]
    ):  # torch draws start values on its own: the caller's numbers stay as they are
        model = _KINDS[type(chosen)](chosen)
    _start(model, generator)
    return model.to(config.device)


_KINDS: dict[type, Callable[[Any], Model]] = {
    DecoderConfig: Decoder,
    LSTMConfig: LSTMLanguageModel,
    LSTMSeq2SeqConfig: LSTMSeq2Seq,
}


def _start(model: Model, generator: torch.Generator) -> None:
    """Draw the start values: matrices uniform, within one over the root of their inputs; biases of linear maps 0."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02 if isinstance(model, Decoder) else 1.0, generator=generator)
        if isinstance(module, (nn.Linear, nn.LSTM)):
            for parameter in module.parameters():
                if parameter.ndim == 2:
                    bound = parameter.shape[1] ** -0.5
                    nn.init.uniform_(parameter, -bound, bound, generator=generator)
                elif isinstance(module, nn.Linear):
                    nn.init.zeros_(parameter)


def _predict(model: Model, ids: Tensor, n_source: int) -> Tensor:
    """Logits after each token from place ``n_source`` on, in one call."""
    if isinstance(model, LSTMSeq2Seq):
        return _logits(model(ids[:, :n_source], ids[:, n_source:]))
    return _logits(model(ids))[:, n_source:]


def _logits(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits


def _reader(model: Model, ids: Tensor) -> Callable[[Tensor], Tensor]:
    """Read ``ids``; what comes back takes one token (B, 1) more at each call and returns its logits."""
    if isinstance(model, Decoder):
        cache = KeyValueCache(capacity=ids.shape[1] + 1024)
        model(ids, cache=cache, last_logits=1)
        return lambda token: _logits(model(token, cache=cache))
    encoded = model.encode(ids) if isinstance(model, LSTMSeq2Seq) else None
    state = None if isinstance(model, LSTMSeq2Seq) else model(ids).state

    def step(token: Tensor) -> Tensor:
        nonlocal state
        output = model(token, state=state) if encoded is None else model(None, token, encoded=encoded, state=state)
        state = output.state
        return _logits(output)

    return step


def time_models(config: CompareConfig, length: int) -> dict[str, dict[str, float]]:
    """Seconds per token of every model: a whole sequence in one call, and one more token after so many.

    The models take turns, so that whatever else the machine does falls on all of them.
    """
    n_ctx = length + config.timed_steps * (config.repeats + 1)
    # The C library keeps blocks of this size for later once it has given back one; until then each step of an LSTM, for
    # which torch packs the weights anew, waits for the system to clear pages, and only the first length would suffer.
    torch.zeros(KEPT, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.inference_mode():
        models = {
            name: make_model(config, name, generator, d_model=config.timed_d_model, n_ctx=n_ctx).eval()
            for name in MODELS
        }
        ids = torch.randint(config.symbols, (1, length), generator=generator).to(config.device)
        whole: dict[str, list[float]] = {name: [] for name in models}
        single: dict[str, list[float]] = {name: [] for name in models}
        steps = {name: _reader(model, ids) for name, model in models.items()}  # which warms up the whole pass, too
        for _, (name, model) in itertools.product(range(config.repeats), models.items()):
            whole[name].append(_clock(config, functools.partial(_predict, model, ids, length // 2)) / length)
        for turn, name in itertools.product(range(config.repeats + 1), models):
            seconds = _clock(config, functools.partial(_repeat, steps[name], ids[:, :1], config.timed_steps), once=True)
            if turn:  # the first is a warm-up
                single[name].append(seconds / config.timed_steps)
    return {
        "whole": {name: min(values) for name, values in whole.items()},
        "single": {name: min(values) for name, values in single.items()},
        "n_parameters": {name: model.n_parameters for name, model in models.items()},
        "flops": {name: _flops(model, length) for name, model in models.items()},
        "dependent_steps": {name: _dependent_steps(model, length) for name, model in models.items()},
    }


def _repeat(step: Callable[[Tensor], Tensor], token: Tensor, times: int) -> None:
    for _ in range(times):
        step(token)


def _clock(config: CompareConfig, work: Callable[[], object], *, once: bool = False) -> float:
    """Seconds of one call; of fast ones, the mean of several unless ``once``."""
    if config.device == "cuda":
        torch.cuda.synchronize()
    began, calls = time.perf_counter(), 0
    while not calls or (not once and time.perf_counter() - began < SHORTEST):
        work()
        calls += 1
        if config.device == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls


def _flops(model: Model, length: int) -> int:
    """Operations of one sequence, as the models count them."""
    if isinstance(model, LSTMSeq2Seq):
        return model.config.flops(length // 2, length - length // 2)
    return model.config.flops(length)


def _dependent_steps(model: Model, length: int) -> int:
    """Layers that must be computed one after the other in one call, whatever the hardware."""
    return model.config.n_layers * (1 if isinstance(model, Decoder) else length)


def copy_batch(
    generator: torch.Generator, *, n: int, distance: int, payload: int, symbols: int
) -> tuple[Tensor, Tensor]:
    """Draw sequences in which every token of the payload must be reproduced ``distance`` steps later.

    A sequence is the payload, blanks, a cue, and the payload again, of which the last token is only predicted; the cue
    is at place ``distance`` - 1.

    Returns
    -------
    tuple
        Tokens (n, distance + payload - 1), and the payload (n, payload): what follows the tokens from the cue on.

    References
    ----------
    Hochreiter, Schmidhuber. "Long Short-Term Memory", Neural Computation 9(8), 1997.
    Arjovsky, Shah, Bengio. "Unitary Evolution Recurrent Neural Networks", 2016. arXiv:1511.06464, section 5.1.
    """
    tokens = torch.randint(symbols, (n, payload), generator=generator)
    blanks = torch.full((n, distance - payload - 1), symbols)
    cue = torch.full((n, 1), symbols + 1)
    return torch.cat((tokens, blanks, cue, tokens[:, :-1]), 1), tokens


def copy_accuracy(config: CompareConfig, name: str, distance: int, seed: int) -> float:
    """Train a model of :data:`MODELS`; return the share of tokens that it then reproduces on fresh sequences."""
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int) -> tuple[Tensor, Tensor]:
        ids, target = copy_batch(generator, n=n, distance=distance, payload=config.payload, symbols=config.symbols)
        return ids.to(config.device), target.to(config.device)

    model = make_model(config, name, generator, d_model=config.d_model, n_ctx=distance + config.payload)
    # Small steps: a second thread would cost time, and the sums, so the accuracies, would depend on their number.
    with one_thread():
        _train(model, config, distance, draw)
        with torch.inference_mode():
            ids, target = draw(TRIED)
            return (_predict(model, ids, distance - 1).argmax(-1) == target).double().mean().item()


def _train(model: Model, config: CompareConfig, distance: int, draw: Callable[[int], tuple[Tensor, Tensor]]) -> None:
    """Adam on fresh sequences, with the norm of the gradient clipped at 1."""
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    for _ in range(config.steps):
        ids, target = draw(config.batch_size)
        loss = F.cross_entropy(_predict(model, ids, distance - 1).flatten(0, 1), target.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
