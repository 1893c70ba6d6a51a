"""Small run folders as ``attsvm inspect`` leaves them, made up from a seed."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from attsvm.records import RunFolder

Array = npt.NDArray[Any]
Result = dict[str, Any]
Arrays = dict[str, Array]
Change = Callable[[Result, Arrays], None]

HOSTILE = (
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=2>",
    "a\u202eb\u200bc",
    "\x00\x07",
    "=cmd|'/C calc'!A0",
    "{{ 7*7 }}",
    "⟨E2⟩",
    "مرحبا",
    "__proto__",
    "constructor",
)
WORDS = ("the", "soft", "max", "margin", "selects", "a", "token", "of", "every", "sentence", "and", "drops", "others")
MEASURES = (
    ("score.fro.correlation", "Correlation (score, Frobenius)", "", "0-1"),
    ("score.fro.heldout", "Held-out agreement (score, Frobenius)", "", "0-1"),
    ("margin", "Margin", "logits", "logits"),
    ("mass_bound", "Proved bound on the dropped mass", "", "0-1"),
    ("top_probability", "Top probability", "share", "0-1"),
    ("entropy", "Entropy", "nats", "nats"),
    ("tokens_90", "Tokens for 90 % of the mass", "tokens", "tokens"),
    ("sink_mass", "Mass on the sink", "", "0-1"),
    ("previous", "Mass on the previous token", "", "0-1"),
    ("induction", "Induction mass", "", "0-1"),
    ("distance", "Distance", "tokens", "tokens"),
)
KINDS = ("previous", "first", "same_token", "separator", "induction", "mixed")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to make up: stacks are (kind, layers, heads), and an encoder-decoder has three of them."""

    name: str = "tiny"
    stacks: tuple[tuple[str, int, int], ...] = (("encoder", 3, 4),)
    n_tokens: int = 14
    n_target: int = 9
    n_shown: int = 2
    spread: float = 3.0
    seed: int = 0
    hostile: bool = False
    pictures: bool = False
    twin: bool = True
    support: bool = True
    values: bool = True

    @property
    def has_target(self) -> bool:
        """Whether there are two texts."""
        return any(kind == "cross" for kind, _, _ in self.stacks)


def make_atlas(plan: Plan | None = None, **changes: Any) -> tuple[Result, Arrays]:
    """Return the records of one run."""
    plan = replace(plan or Plan(), **changes)
    generator = np.random.default_rng(plan.seed)
    modules = list(_modules(plan))
    shown = [_shown(plan, index) for index in range(plan.n_shown)]
    heads = [_head(plan, module, head, generator) for module in modules for head in range(module["n_heads"])]
    arrays: Arrays = {"similarity": _similarity(len(heads), generator)}
    for s, text in enumerate(shown):
        for module in modules:
            sizes = [len(text[module[side]]["tokens"]) for side in ("query_side", "key_side")]
            made = _patterns(plan, module, *sizes, generator)
            arrays |= {f"shown.{s}.{module['index']}.{name}": array for name, array in made.items()}
    return _result(plan, modules, heads, shown), arrays


def write_atlas(path: Path, plan: Plan | None = None, *edits: Change, **changes: Any) -> Path:
    """Write a run folder, after edits to its records."""
    result, arrays = make_atlas(plan, **changes)
    for edit in edits:
        edit(result, arrays)
    folder = RunFolder(path)
    folder.create()
    folder.checkpoint.rmdir()
    folder.write_config({"command": result["command"], "max_queries": 600})
    folder.write_arrays(arrays)
    folder.write_result(result)
    return path


def _result(plan: Plan, modules: list[Result], heads: list[Result], shown: list[Result]) -> Result:
    return {
        "kind": "inspect",
        "name": plan.name,
        "created": "2026-11-21T18:00:00+00:00",
        "command": f"attsvm inspect models/{plan.name} --text-file corpus.txt",
        "seconds": {"total": 81.25},
        "seed": plan.seed,
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "versions": {"python": "3.11.4", "attsvm": "0.4.0", "transformers": "5.23.0"},
        "model": {
            "name": HOSTILE[0] if plan.hostile else f"models/{plan.name}",
            "family": "bert",
            "n_parameters": 22_713_216,
            "dtype": "float32",
            "tier": "interface",
            "notes": ["Dropout is off while the model is read."],
        },
        "check": {"max_difference": 2.4e-7, "module": modules[0]["name"], "n_rows": 512, "compared": True, "note": ""},
        "corpus": {
            "n_texts": 300,
            "n_windows": 304,
            "n_tokens": 8123,
            "special": "keep",
            "notes": ["2 texts were longer than the context of 512 tokens and were cut into windows."],
        },
        "modules": modules,
        "measures": [
            {"key": key, "title": title, "unit": unit, "scale": scale, "explanation": f"{title}, over all queries."}
            for key, title, unit, scale in MEASURES
        ],
        "heads": heads,
        "shown": shown,
        "solution_names": [
            {"space": "score", "norm": "fro", "title": "score space, Frobenius norm"},
            {"space": "residual", "norm": "nuc", "title": "residual space, nuclear norm"},
        ],
        "primary": {"space": "score", "norm": "fro", "why": "score space is exact for every model"},
    }


def _modules(plan: Plan) -> Iterator[Result]:
    index = 0
    for kind, n_layers, n_heads in plan.stacks:
        both = {"encoder": ("source", "source"), "cross": ("target", "source")}
        own = "target" if plan.has_target else "source"
        query_side, key_side = both.get(kind, (own, own))
        for layer in range(n_layers):
            yield {
                "index": index,
                "name": f"{kind}.layer.{layer}.attention",
                "kind": kind,
                "layer": layer,
                "n_heads": n_heads,
                "n_kv_heads": n_heads // 2 if n_heads % 2 == 0 and kind == "decoder" else n_heads,
                "d_head": 8,
                "heads": list(range(n_heads)),
                "query_side": query_side,
                "key_side": key_side,
                "residual": None if kind == "encoder" else "positions are rotary",
            }
            index += 1


def _head(plan: Plan, module: Result, head: int, generator: np.random.Generator) -> Result:
    prefix = f"{module['kind']}." if len(plan.stacks) > 1 else ""
    tokens = [*HOSTILE[:3], *WORDS[:4]] if plan.hostile else list(WORDS[:7])
    return {
        "label": f"{prefix}L{module['layer']}.H{head}",
        "kind": module["kind"],
        "layer": module["layer"],
        "head": head,
        "kv_head": head * module["n_kv_heads"] // module["n_heads"],
        "module": module["index"],
        "values": _values(plan, module, generator),
        "head_kind": str(generator.choice(KINDS)),
        "top_tokens": [[token, float(share)] for token, share in zip(tokens, np.geomspace(0.4, 0.01, 7), strict=True)],
        "solutions": [_solution("score", "fro", generator), _solution("residual", "nuc", generator)],
        "spectra": {
            name: np.sort(np.append(generator.uniform(0, 0.9, 7), 1.0))[::-1].tolist()
            for name in ("own", "score.fro", "residual.nuc")
        },
        "soft": {"dimension": 3, "finite_share": 0.4, "directional_correlation": 0.8} if head % 2 else None,
    }


def _values(plan: Plan, module: Result, generator: np.random.Generator) -> Result:
    values: Result = {}
    for key, _, _, scale in MEASURES:
        mean = float(generator.uniform(0.02, 0.98) if scale == "0-1" else generator.gamma(2.0, 2.0))
        half = float(generator.uniform(0.001, 0.02))
        values[key] = {"mean": mean, "low": mean - half, "high": mean + half, "n": 300}
    if module["kind"] == "cross":
        values["distance"] = values["previous"] = None
    if not plan.values:
        return dict.fromkeys(values)
    return values


def _solution(space: str, norm: str, generator: np.random.Generator) -> Result:
    return {
        "space": space,
        "norm": norm,
        "status": "optimal",
        "gap": 3e-7,
        "seconds": 0.31,
        "n_queries": 600,
        "n_constraints": 9213,
        "n_support": int(generator.integers(20, 90)),
        "size": 12.3,
        "correlation": float(generator.uniform(0.2, 0.95)),
        "null_correlation": 0.08,
        "recovery": 1.0,
        "heldout": float(generator.uniform(0.3, 0.99)),
        "heldout_n": 300,
        "rank": 8,
        "effective_rank": 5.2,
        "own_rank": 8,
        "own_effective_rank": 6.1,
        "note": "",
    }


def _shown(plan: Plan, index: int) -> Result:
    rows = max(1, int(np.sqrt(plan.n_tokens - 1)))
    source = _patches(rows) if plan.pictures else _text(plan, plan.n_tokens, index)
    target = _text(plan, plan.n_target, index + 7) if plan.has_target else None
    picture = {"width": 48, "height": 48, "rows": rows, "columns": rows, "data": _png(48)} if plan.pictures else None
    return {
        "window": index,
        "text": "" if plan.pictures else _joined(source),
        "source": source,
        "target": target,
        "picture": picture,
        "support_known": plan.support,
    }


def _text(plan: Plan, n_tokens: int, offset: int) -> Result:
    """Tokens with marks at both ends; every third word has two parts."""
    tokens, words = ["[CLS]"], [-1]
    word = 0
    while len(tokens) < n_tokens - 1:
        text = HOSTILE[word % len(HOSTILE)] if plan.hostile else WORDS[(word + offset) % len(WORDS)]
        parts = [text[:2], text[2:]] if word % 3 == 2 and len(text) > 3 else [text]
        tokens += [f" {parts[0]}", *parts[1:]]
        words += [word] * len(parts)
        word += 1
    tokens, words = [*tokens[: n_tokens - 1], "[SEP]"], [*words[: n_tokens - 1], -1]
    return {"tokens": tokens, "words": words, "special": [word < 0 for word in words]}


def _joined(piece: Result) -> str:
    return "".join(token for token, special in zip(piece["tokens"], piece["special"], strict=True) if not special)


def _patches(rows: int) -> Result:
    names = [f"r{row}c{column}" for row in range(rows) for column in range(rows)]
    return {"tokens": ["[CLS]", *names], "words": [-1] * (len(names) + 1), "special": [True, *[False] * len(names)]}


def _png(size: int) -> str:
    """A picture of a colour ramp as a data URI."""
    ramp = np.linspace(0, 255, size, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:, None], np.uint8(90)), -1)
    lines = b"".join(b"\x00" + row.tobytes() for row in pixels)
    out = io.BytesIO(b"")
    out.write(b"\x89PNG\r\n\x1a\n")
    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")):
        out.write(struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content)))
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _similarity(count: int, generator: np.random.Generator) -> Array:
    factors = generator.uniform(0, 1, (count, 3))
    similar = factors @ factors.T / 3
    np.fill_diagonal(similar, 1.0)
    return np.clip(similar, 0, 1).astype(np.float32)


def codes(weights: Array) -> Array:
    """The square-root code of weights."""
    return np.round(255 * np.sqrt(weights)).astype(np.uint8)


def _softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    weights: Array = powers / powers.sum(-1, keepdims=True)
    return weights


def _patterns(plan: Plan, module: Result, n_queries: int, n_keys: int, generator: np.random.Generator) -> Arrays:
    n_heads = module["n_heads"]
    logits = generator.normal(0, plan.spread, (n_heads, n_queries, n_keys)).astype(np.float32)
    if module["kind"] == "decoder":
        logits[:, np.triu(np.ones((n_queries, n_keys), bool), 1)] = -np.inf
    top = np.sort(np.partition(logits, -2, -1)[..., -2:], -1) if n_keys > 1 else None
    made: Arrays = {
        "pattern": codes(_softmax(logits)),
        "selected": logits.argmax(-1).astype(np.int32),
        "margin": np.full(logits.shape[:2], np.inf, np.float32) if top is None else top[..., 1] - top[..., 0],
    }
    if plan.support:
        runner_up = logits.argsort(-1)[..., -min(2, n_keys)]
        support = np.zeros(logits.shape, np.uint8)
        np.put_along_axis(support, runner_up[..., None], (made["margin"] < plan.spread / 4)[..., None], -1)
        made["support"] = support
    if plan.twin:
        twin = _softmax(logits + generator.normal(0, 1, logits.shape).astype(np.float32))
        kept = np.argsort(-twin, -1)[..., : min(8, n_keys)]
        made["twin_index"] = kept.astype(np.int32)
        made["twin_weight"] = codes(np.take_along_axis(twin, kept, -1))
    return made


BERT: Sequence[tuple[str, int, int]] = (("encoder", 12, 12),)
GPT: Sequence[tuple[str, int, int]] = (("decoder", 12, 12),)
T5: Sequence[tuple[str, int, int]] = (("encoder", 2, 4), ("decoder", 2, 4), ("cross", 2, 4))
