r"""Generation: one token after the other from a decoder or an encoder-decoder.

At each step the model gives logits $l$ of the next token. Greedy decoding takes the largest; sampling draws from
$\mathrm{softmax}(l / \tau)$ cut to the ``top_k`` largest logits and to the smallest set whose probability reaches
``top_p``; beam search keeps the ``beams`` sequences of largest $\sum_t \log p_t$ and returns that of largest
$\sum_t \log p_t / n^{\text{penalty}}$, n its number of new tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attsvm.attention.cache import KeyValueCache
from attsvm.errors import InvalidInputError
from attsvm.models.decoder import Decoder
from attsvm.models.seq2seq import Seq2Seq

__all__ = ["Generation", "GenerationConfig", "generate"]

OnToken = Callable[[int, Tensor], None]
"""Called after each step with its number and the new tokens (B,); -1 in a row that has ended."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How tokens are chosen, and when to stop.

    Attributes
    ----------
    max_new_tokens
        >= 1.
    temperature
        0 is greedy; above 0 the logits are divided by it and a token is drawn.
    top_k
        Draw from so many tokens of largest logit; None for all.
    top_p
        Draw from the smallest set of tokens whose probability is at least this, in (0, 1].
    repetition_penalty
        Logits of tokens that stand in the sequence are divided by it where positive, multiplied where negative; 1 is
        none.
    beams
        Above 1: beam search, which draws nothing.
    length_penalty
        Power of the length by which beams are judged; above 0 longer ones gain.
    eos_ids
        Tokens that end a sequence; None for those of the model.
    stop
        Sequences of tokens that end a sequence where they come up.
    seed
        Of what is drawn.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    beams: int = 1
    length_penalty: float = 1.0
    eos_ids: tuple[int, ...] | None = None
    stop: tuple[tuple[int, ...], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        rules: dict[str, tuple[str, Callable[[Any], bool]]] = {
            "max_new_tokens": ("an integer >= 1", lambda v: _integer(v) and v >= 1),
            "temperature": (">= 0 and finite", lambda v: 0 <= v < math.inf),
            "top_k": ("an integer >= 1 or None", lambda v: v is None or (_integer(v) and v >= 1)),
            "top_p": ("in (0, 1]", lambda v: 0 < v <= 1),
            "repetition_penalty": ("> 0 and finite", lambda v: 0 < v < math.inf),
            "beams": ("an integer >= 1", lambda v: _integer(v) and v >= 1),
            "length_penalty": ("finite", math.isfinite),
        }
        for name, (must, holds) in rules.items():
            value = getattr(self, name)
            if not holds(value):
                raise InvalidInputError(f"GenerationConfig: {name} must be {must}, got {value!r}.")
        if self.beams > 1 and self.temperature > 0:
            raise InvalidInputError(
                f"GenerationConfig: temperature must be 0 with beams, which draw nothing, got {self.temperature!r}."
            )
        if any(len(one) == 0 for one in self.stop):
            raise InvalidInputError(
                "GenerationConfig: stop must hold sequences of at least one token, got an empty one."
            )


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What was generated for B prompts.

    Attributes
    ----------
    tokens
        For each prompt its new tokens, with the one that ended it.
    scores
        (B,): sum of the log-probabilities of the new tokens, under the model as it is (before temperature and cuts).
    ended
        (B,) booleans: False where ``max_new_tokens`` or the end of the context came first.
    weights
        None unless asked for; otherwise for each step the patterns of :class:`~attsvm.models.output.ModelOutput`. Rows
        that have ended go on to be computed and mean nothing. The first step holds the whole prompt.
    """

    tokens: list[list[int]]
    scores: Tensor
    ended: Tensor
    weights: list[dict[str, list[Tensor]]] | None = None


@torch.no_grad()
def generate(
    model: Decoder | Seq2Seq,
    ids: Tensor | Sequence[Sequence[int]],
    config: GenerationConfig | None = None,
    *,
    attention_mask: Tensor | None = None,
    use_cache: bool = True,
    weights: bool = False,
    on_token: OnToken | None = None,
) -> Generation:
    """Go on from prompts (decoder), or answer source texts (encoder-decoder).

    Parameters
    ----------
    model
        Its dropout is off while it generates.
    ids
        Prompts of any lengths: lists of tokens, or (B, T) with ``attention_mask`` where they differ.
    config
        How tokens are chosen; default greedy.
    attention_mask
        (B, T), True or 1 = real token, on either side.
    use_cache
        Keep keys and values; without, every step computes the whole sequence again, to the same result.
    weights
        Return the attention of each step.
    on_token
        Called after each step; not with beams, whose tokens are settled at the end.

    Returns
    -------
    Generation
        New tokens, their scores, and whether each sequence came to its end.

    Raises
    ------
    InvalidInputError
        If a prompt is empty or does not fit, or an argument is not what it must be.

    Notes
    -----
    Prompts are padded on the left, so that all of them end at the same place. With a cache a step costs one position.

    Examples
    --------
    >>> from attsvm.models.decoder import DecoderConfig
    >>> _ = torch.manual_seed(0)
    >>> model = Decoder(DecoderConfig(d_vocab=10, d_model=8, n_layers=1, n_heads=2, d_mlp=16, n_ctx=12))
    >>> found = generate(model, [[1, 2], [3]], GenerationConfig(max_new_tokens=4))
    >>> [len(tokens) for tokens in found.tokens]
    [4, 4]
    """
    config = GenerationConfig() if config is None else config
    if config.beams > 1 and (weights or on_token is not None):
        raise InvalidInputError("generate: weights and on_token must be absent with beams.")
    prompts, mask = _left_padded(ids, attention_mask, device=next(model.parameters()).device)
    if not isinstance(model, (Decoder, Seq2Seq)):
        raise InvalidInputError(f"generate: model must be a Decoder or a Seq2Seq, got {type(model).__name__}.")
    training = model.training
    model.eval()
    try:
        stepper = _Stepper(model, prompts, mask, config, use_cache=use_cache, weights=weights)
        return _beam_search(stepper, config) if config.beams > 1 else _one_by_one(stepper, config, on_token)
    finally:
        model.train(training)


class _Stepper:
    """The model as one function: from the tokens that are new to the logits of the next one."""

    def __init__(
        self,
        model: Decoder | Seq2Seq,
        prompts: Tensor,
        mask: Tensor,
        config: GenerationConfig,
        *,
        use_cache: bool,
        weights: bool,
    ) -> None:
        self.model, self.wants_weights = model, weights
        self.eos = _end_ids(model, config)
        self.patterns: list[dict[str, list[Tensor]]] = []
        count = config.max_new_tokens
        self.encoded: Tensor | None = None
        self.source_mask = None if bool(mask.all()) else mask
        if isinstance(model, Seq2Seq):
            self.encoded = model.encode(prompts, self.source_mask)
            prompts = torch.full((len(prompts), 1), _start_id(model), device=prompts.device)
            mask = torch.ones_like(prompts, dtype=torch.bool)
            self.limit = count if model.config.n_ctx is None else min(count, model.config.n_ctx)
            self.cache: Any = model.new_cache(count + 1) if use_cache else None
        else:
            room = model.config.n_ctx - prompts.shape[1]
            if room < 0:
                raise InvalidInputError(
                    f"generate: ids must fit into the context of {model.config.n_ctx} positions, "
                    f"got a prompt of {prompts.shape[1]}."
                )
            self.limit = min(count, room + 1)
            self.cache = KeyValueCache(prompts.shape[1] + count) if use_cache else None
        self.all, self.mask = prompts, mask
        self.prompt_length = prompts.shape[1]
        self._new = prompts

    @property
    def new_tokens(self) -> Tensor:
        """Tokens (B, so far) behind the prompt."""
        return self.all[:, self.prompt_length :]

    def logits(self) -> Tensor:
        """Logits (B, d_vocab) of the next token, in float32 at least."""
        ids = self.all if self.cache is None else self._new
        padded = not bool(self.mask.all())
        if isinstance(self.model, Seq2Seq):
            out = self.model(
                None,
                ids,
                attention_mask=self.source_mask,
                encoded=self.encoded,
                cache=self.cache,
                weights=self.wants_weights,
                last_logits=1,
            )
        else:
            out = self.model(
                ids,
                attention_mask=self.mask if padded else None,
                cache=self.cache,
                weights=self.wants_weights,
                last_logits=1,
            )
        if self.wants_weights:
            self.patterns.append(out.weights)
        if out.logits is None:
            raise InvalidInputError("generate: model must have a head, got a model without one.")
        last: Tensor = out.logits[:, -1]
        return last if last.dtype == torch.float64 else last.float()

    def append(self, tokens: Tensor) -> None:
        """Take tokens (B,) as the next ones."""
        self._new = tokens.unsqueeze(-1)
        self.all = torch.cat([self.all, self._new], 1)
        self.mask = torch.cat([self.mask, torch.ones_like(self._new, dtype=torch.bool)], 1)

    def reorder(self, index: Tensor) -> None:
        """Go on with rows ``index``, some of them several times."""
        self.all, self.mask, self._new = self.all[index], self.mask[index], self._new[index]
        if self.source_mask is not None:
            self.source_mask = self.source_mask[index]
        if self.encoded is not None:
            self.encoded = self.encoded[index]
        if self.cache is not None:
            self.cache.reorder(index)


def _one_by_one(stepper: _Stepper, config: GenerationConfig, on_token: OnToken | None) -> Generation:
    batch = len(stepper.all)
    device = stepper.all.device
    drawing = torch.Generator(device=device).manual_seed(config.seed)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    lengths = torch.zeros(batch, dtype=torch.int64, device=device)
    scores = torch.zeros(batch, dtype=torch.float64, device=device)
    fill = stepper.eos[0] if stepper.eos else 0
    for step in range(stepper.limit):
        logits = stepper.logits()
        chosen = _choose(logits, stepper.all, config, drawing)
        gained = torch.log_softmax(logits.double(), -1).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        scores += torch.where(ended, 0.0, gained)
        lengths += ~ended
        if on_token is not None:
            on_token(step, torch.where(ended, -1, chosen))
        stepper.append(torch.where(ended, fill, chosen))
        ended = ended | _ends(stepper.new_tokens, stepper.eos, config.stop)
        if bool(ended.all()):
            break
    rows = zip(stepper.new_tokens.tolist(), lengths.tolist(), strict=True)
    return Generation(
        tokens=[row[:length] for row, length in rows],
        scores=scores,
        ended=ended,
        weights=stepper.patterns if stepper.wants_weights else None,
    )


def _choose(logits: Tensor, so_far: Tensor, config: GenerationConfig, drawing: torch.Generator) -> Tensor:
    """The next token (B,) of each row."""
    logits = _penalised(logits, so_far, config.repetition_penalty)
    if config.temperature == 0:
        return logits.argmax(-1)
    logits = logits / config.temperature
    if config.top_k is not None and config.top_k < logits.shape[-1]:
        least = logits.topk(config.top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if config.top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        chances = ordered.softmax(-1)
        # A token stays as long as those before it fall short of top_p, so the first always does.
        beyond = chances.cumsum(-1) - chances >= config.top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=drawing).squeeze(-1)


def _penalised(logits: Tensor, so_far: Tensor, penalty: float) -> Tensor:
    if penalty == 1:
        return logits
    seen = logits.gather(-1, so_far)
    return logits.scatter(-1, so_far, torch.where(seen < 0, seen * penalty, seen / penalty))


def _ends(new: Tensor, eos: tuple[int, ...], stop: tuple[tuple[int, ...], ...]) -> Tensor:
    """(B,): whether a row ends with its last token."""
    ended = torch.zeros(len(new), dtype=torch.bool, device=new.device)
    for ending in (*((one,) for one in eos), *stop):
        if new.shape[1] >= len(ending):
            ended |= (new[:, -len(ending) :] == torch.tensor(ending, device=new.device)).all(-1)
    return ended


@dataclass
class _Found:
    """The best finished sequences of one prompt."""

    beams: int
    kept: list[tuple[float, float, list[int]]] = field(default_factory=list)

    def add(self, judged: float, score: float, tokens: list[int]) -> None:
        self.kept.append((judged, score, tokens))
        self.kept.sort(key=lambda one: -one[0])
        del self.kept[self.beams :]

    def settled(self, best_open: float) -> bool:
        """Whether no open sequence, judged as it stands, is better than the worst of those kept."""
        return len(self.kept) == self.beams and self.kept[-1][0] >= best_open


def _beam_search(stepper: _Stepper, config: GenerationConfig) -> Generation:
    prompts, k = len(stepper.all), config.beams
    device = stepper.all.device
    stepper.reorder(torch.arange(prompts, device=device).repeat_interleave(k))
    # At first all beams of a prompt are the same, so only one may branch.
    scores = torch.full((prompts, k), -math.inf, dtype=torch.float64, device=device)
    scores[:, 0] = 0.0
    found = [_Found(beams=k) for _ in range(prompts)]
    done = [False] * prompts
    for step in range(stepper.limit):
        logits = _penalised(stepper.logits(), stepper.all, config.repetition_penalty)
        d_vocab = logits.shape[-1]
        total = scores.unsqueeze(-1) + torch.log_softmax(logits.double(), -1).view(prompts, k, d_vocab)
        # Twice as many, and as many again as can end a sequence: k of them go on.
        wanted = min(k * max(2, 1 + len(stepper.eos)), k * d_vocab)
        best, place = total.flatten(1).topk(wanted, -1)
        sources, tokens, scores = _go_on(stepper, config, found, done, best, place, step)
        stepper.reorder(sources)
        stepper.append(tokens)
        length = float(step + 1) ** config.length_penalty
        done = [one or found[b].settled(float(scores[b].max()) / length) for b, one in enumerate(done)]
        if all(done):
            break
    length = float(stepper.new_tokens.shape[1]) ** config.length_penalty
    rows = stepper.new_tokens.view(prompts, k, -1).tolist()
    ended = []
    for b in range(prompts):
        finished = {tuple(one[2]) for one in found[b].kept}
        if not done[b]:
            for j in range(k):
                if math.isfinite(float(scores[b, j])):
                    found[b].add(float(scores[b, j]) / length, float(scores[b, j]), rows[b][j])
        ended.append(tuple(found[b].kept[0][2]) in finished)
    return Generation(
        tokens=[one.kept[0][2] for one in found],
        scores=torch.tensor([one.kept[0][1] for one in found], dtype=torch.float64, device=device),
        ended=torch.tensor(ended, device=device),
    )


def _go_on(
    stepper: _Stepper,
    config: GenerationConfig,
    found: list[_Found],
    done: list[bool],
    best: Tensor,
    place: Tensor,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sort candidates into those that end and the k of each prompt that go on: their rows, tokens and scores."""
    prompts, k = len(found), config.beams
    d_vocab = stepper.model.config.d_vocab
    rows, tokens = torch.zeros(prompts, k, dtype=torch.int64), torch.zeros(prompts, k, dtype=torch.int64)
    scores = torch.full((prompts, k), -math.inf, dtype=torch.float64)
    history = stepper.new_tokens.tolist()
    for b in range(prompts):
        taken = 0
        rows[b] = b * k
        for rank, (score, where) in enumerate(zip(best[b].tolist(), place[b].tolist(), strict=True)):
            if taken == k or not math.isfinite(score):
                break
            row, token = b * k + where // d_vocab, where % d_vocab
            line = [*history[row], token]
            if any(line[-len(ending) :] == list(ending) for ending in (*((e,) for e in stepper.eos), *config.stop)):
                # Beyond the k best a sequence that ends would push out open ones that are better.
                if rank < k and not done[b]:
                    found[b].add(score / float(step + 1) ** config.length_penalty, score, line)
                continue
            rows[b, taken], tokens[b, taken], scores[b, taken] = row, token, score
            taken += 1
    device = stepper.all.device
    return rows.flatten().to(device), tokens.flatten().to(device), scores.to(device)


def _left_padded(
    ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None, *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Prompts (B, T) that end at the right edge, and where they are real."""
    if isinstance(ids, Tensor):
        if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise InvalidInputError(
                f"generate: ids must be integers (B, T), or lists of tokens, got {ids.dtype} of shape "
                f"{tuple(ids.shape)}."
            )
        real = torch.ones_like(ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        if real.shape != ids.shape:
            raise InvalidInputError(
                f"generate: attention_mask must have the shape {tuple(ids.shape)} of ids, got {tuple(real.shape)}."
            )
        rows = [row[keep].tolist() for row, keep in zip(ids, real.to(ids.device), strict=True)]
    else:
        if attention_mask is not None:
            raise InvalidInputError("generate: attention_mask must be None where ids are lists, which have no padding.")
        rows = [list(row) for row in ids]
    if not rows or not all(rows):
        empty = next((k for k, row in enumerate(rows) if not row), 0)
        raise InvalidInputError(f"generate: ids must hold prompts of at least one token, got none in prompt {empty}.")
    longest = max(map(len, rows))
    padded = torch.tensor([[row[0]] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows], device=device)
    return padded, mask


def _end_ids(model: Decoder | Seq2Seq, config: GenerationConfig) -> tuple[int, ...]:
    own = config.eos_ids if config.eos_ids is not None else model.config.eos_id
    return () if own is None else (own,) if isinstance(own, int) else tuple(own)


def _start_id(model: Seq2Seq) -> int:
    start = model.config.start_id
    if start is None:
        raise InvalidInputError(
            "generate: model must have a start_id in its config for the first target token, got None."
        )
    return int(start)


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
