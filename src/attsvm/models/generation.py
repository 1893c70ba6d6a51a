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

from attsvm.errors import InvalidInputError
from attsvm.models.checks import is_number, is_whole
from attsvm.models.decoder import Decoder
from attsvm.models.products import quick_products
from attsvm.models.seq2seq import Seq2Seq
from attsvm.models.stepper import Stepper, left_padded

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
    lookup
        Guess up to so many tokens at once from what followed the same tokens earlier in the text, and let one pass of
        the model check them (:mod:`attsvm.models.lookup`): the tokens are the same, but for rounding where two are
        equally likely, in fewer passes where the text repeats itself. 0 is off. Works for a single prompt, with the
        cache and without beams or weights; otherwise it is ignored.
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
    lookup: int = 8

    def __post_init__(self) -> None:
        rules: dict[str, tuple[str, Callable[[Any], bool]]] = {
            "max_new_tokens": ("an integer >= 1", lambda v: is_whole(v) and v >= 1),
            "temperature": (">= 0 and finite", lambda v: is_number(v) and v >= 0),
            "top_k": ("an integer >= 1 or None", lambda v: v is None or (is_whole(v) and v >= 1)),
            "top_p": ("in (0, 1]", lambda v: is_number(v) and 0 < v <= 1),
            "repetition_penalty": ("> 0 and finite", lambda v: is_number(v) and v > 0),
            "beams": ("an integer >= 1", lambda v: is_whole(v) and v >= 1),
            "length_penalty": ("finite", is_number),
            "eos_ids": ("a sequence of integers or None", lambda v: v is None or _are_tokens(v)),
            "stop": ("sequences of integers", lambda v: isinstance(v, (tuple, list)) and all(map(_are_tokens, v))),
            "seed": ("an integer below 2**63", is_whole),
            "lookup": ("an integer >= 0", lambda v: is_whole(v) and v >= 0),
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
    if not isinstance(model, (Decoder, Seq2Seq)):
        raise InvalidInputError(f"generate: model must be a Decoder or a Seq2Seq, got {type(model).__name__}.")
    config = GenerationConfig() if config is None else config
    if not isinstance(config, GenerationConfig):
        raise InvalidInputError(f"generate: config must be a GenerationConfig or None, got {type(config).__name__}.")
    if config.beams > 1 and (weights or on_token is not None):
        raise InvalidInputError("generate: weights and on_token must be absent with beams.")
    prompts, mask = left_padded(
        ids,
        attention_mask,
        device=next(model.parameters()).device,
        pad_id=model.config.pad_id,
        eos_id=model.config.eos_id,
    )
    training = model.training
    model.eval()
    try:
        with quick_products(model):
            stepper = Stepper(
                model,
                prompts,
                mask,
                count=config.max_new_tokens,
                eos_ids=config.eos_ids,
                use_cache=use_cache,
                weights=weights,
                lookup=config.lookup if config.beams == 1 else 0,
            )
            if config.beams > 1:
                return _beam_search(stepper, config)
            return _one_by_one(stepper, config, on_token)
    finally:
        model.train(training)


def _one_by_one(stepper: Stepper, config: GenerationConfig, on_token: OnToken | None) -> Generation:
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


def _beam_search(stepper: Stepper, config: GenerationConfig) -> Generation:
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
    stepper: Stepper,
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


def _are_tokens(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(map(is_whole, value))
