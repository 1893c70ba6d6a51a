"""From a model and texts to the atlas of its heads."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from attsvm.errors import AttSVMError, InvalidInputError, RecordError
from attsvm.microscope.accumulate import Accumulator
from attsvm.microscope.analysis import HeadJob, Wanted, wanted_solutions
from attsvm.microscope.atlas import HeadAtlas
from attsvm.microscope.calls import ModuleInfo
from attsvm.microscope.capture import attention_modules
from attsvm.microscope.check import Check, check_against_eager
from attsvm.microscope.config import InspectConfig, chosen_heads
from attsvm.microscope.corpus import read_corpus
from attsvm.microscope.loading import Loaded, load
from attsvm.microscope.passes import measure, sample
from attsvm.microscope.plan import SamplePlan, sample_plan
from attsvm.microscope.residual import ResidualHead, residual_heads
from attsvm.microscope.result import Found, atlas_of
from attsvm.microscope.solutions import SolutionSettings
from attsvm.microscope.windows import Corpus, batches
from attsvm.microscope.workers import solve_heads
from attsvm.records import RunFolder, package_versions, read_json, source_commit, write_json

__all__ = ["Progress", "inspect", "inspect_into"]

Progress = Callable[[str, float, float, str], None]
"""Called with (task, done, total, note); tasks are "measure", "sample" and "solve"."""

MOST_ROWS = 40_000
"""Queries times keys of the max-margin problem of a head; minutes a head would be needed for many more."""

DEFAULT_QUERIES = 600

Residual = list[ResidualHead] | str
Text = str | tuple[str, str] | Path


def inspect(
    model: Any,
    tokenizer: Any = None,
    texts: Sequence[Text] = (),
    *,
    targets: Sequence[str] | None = None,
    output_dir: Path | str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> HeadAtlas:
    """Look at every attention head of a model: what it selects, how hard, and how that compares with max-margin.

    Parameters
    ----------
    model
        A model of transformers, or the id or local path of one. It is left as it was.
    tokenizer
        Its tokenizer; default the one that lies beside the model.
    texts
        Texts, or paths of pictures for a vision model; a pair of texts is two segments to an encoder, and a text with
        its target to an encoder-decoder.
    targets
        What the decoder of an encoder-decoder reads for each text; default what the model itself writes.
    output_dir
        Folder that keeps intermediate results and the records; a run that was interrupted goes on there. Default: a
        temporary one, and the records stay in memory.
    progress
        Called as work goes on.
    settings
        Attributes of :class:`~attsvm.microscope.config.InspectConfig`, by name.

    Returns
    -------
    HeadAtlas
        The record of every head.

    Raises
    ------
    InvalidInputError
        If an argument cannot be used.
    UnsupportedError
        If the attention of the model cannot be read.

    Examples
    --------
    >>> atlas = inspect("path/to/model", texts=["The black cat ate the mouse."])  # doctest: +SKIP
    >>> atlas["L0.H0"]["margin"]  # doctest: +SKIP
    2.5
    """
    with ExitStack() as stack:
        path = stack.enter_context(tempfile.TemporaryDirectory()) if output_dir is None else output_dir
        folder = RunFolder(Path(path) / "run" if output_dir is None else path)
        config = InspectConfig.checked(**settings)
        return inspect_into(folder, model, tokenizer, texts, targets=targets, config=config, progress=progress)


def inspect_into(
    folder: RunFolder,
    model: Any,
    tokenizer: Any,
    texts: Sequence[Text],
    *,
    targets: Sequence[str] | None = None,
    config: InspectConfig,
    command: str = "",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> HeadAtlas:
    """Do the work of :func:`inspect` in a folder, and leave the records there.

    Parameters
    ----------
    folder
        Where; new, or an unfinished run of the same settings, which goes on.
    model, tokenizer, texts, targets
        As in :func:`inspect`.
    config
        The settings.
    command
        How to run it again, for the record.
    overwrite
        Whether the records of an earlier run may be replaced.
    progress
        Called as work goes on.
    """
    tell = progress or (lambda task, done, total, note: None)
    began = time.monotonic()
    _check_folder(folder, overwrite)
    # A model that is loaded already stays where and what it is.
    own = isinstance(model, torch.nn.Module)
    loaded = load(
        model,
        tokenizer,
        device=None if own else config.device,
        dtype=None if own else getattr(torch, config.dtype),
    )
    modules = attention_modules(loaded.model)
    chosen = chosen_heads(modules, config)
    residual = {index: _residual(loaded, modules[index]) for index in chosen}
    wanted = _wanted(config, residual)
    corpus = read_corpus(loaded, texts, targets=targets, max_tokens=config.max_tokens, special=config.special)
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"kind": "inspect", "name": folder.path.name, "command": command, "seed": config.seed}
    about |= {"versions": package_versions("torch", "numpy", "numba", "transformers", "safetensors")}
    about |= {"commit": source_commit(), "created": created}
    settings = {**about, "config": config.model_dump(mode="json"), "input": _fingerprint(loaded, corpus)}
    _check_same(folder, settings, overwrite)
    with folder.lock():
        if overwrite:
            folder.clear()
            folder.create()
        folder.write_config(settings)
        place, kept = folder.checkpoint, {index: modules[index] for index in chosen}
        sums, plan, corpus = _run_model(loaded, kept, corpus, config, place, tell)
        found = Found(
            loaded=loaded,
            corpus=corpus,
            plan=plan,
            modules=kept,
            chosen=chosen,
            reasons={index: one if isinstance(one, str) else None for index, one in residual.items()},
            wanted=wanted,
            sums=sums,
            check=_checked(loaded, corpus, place / "check.json"),
            folder=place,
        )
        _solve(found, residual, config, tell)
        atlas = atlas_of(found, {**about, "seconds": {"total": time.monotonic() - began}}, settings)
        atlas.write(folder)
    return atlas


def _run_model(
    loaded: Loaded,
    modules: dict[int, ModuleInfo],
    corpus: Corpus,
    config: InspectConfig,
    place: Path,
    tell: Progress,
) -> tuple[Accumulator, SamplePlan, Corpus]:
    """The two passes; what an earlier try left is used. The corpus comes back with notes on the sample."""
    samples = place / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    sums = measure(
        loaded,
        corpus,
        modules.values(),
        batch_size=config.batch_size,
        special=config.special,
        checkpoint=place / "measures.safetensors",
        tell=lambda done, total: tell("measure", done, total, "texts"),
    )
    most, notes = _affordable(corpus, config.max_queries)
    plan = sample_plan(corpus, max_queries=most, max_heldout=max(1, most // 2), n_shown=config.n_shown)
    if not (samples / "shown.safetensors").exists():
        sample(
            loaded,
            corpus,
            plan,
            modules,
            special=config.special,
            folder=samples,
            tell=lambda done, total: tell("sample", done, total, "texts"),
        )
    return sums, plan, dataclasses.replace(corpus, notes=(*corpus.notes, *notes))


def _solve(found: Found, residual: dict[int, Residual], config: InspectConfig, tell: Progress) -> None:
    """The max-margin problems of all heads that have no record yet."""
    heads = found.folder / "heads"
    heads.mkdir(exist_ok=True)
    jobs = [
        HeadJob(
            index=index,
            info=info,
            head=head,
            residual=_one(residual[index], head),
            first_residual=_one(residual[index], 0),
            wanted=found.wanted[index],
        )
        for index, info in found.modules.items()
        for head in found.chosen[index]
    ]
    solve_heads(
        jobs,
        found.folder / "samples",
        heads,
        shown=[found.plan.windows.index(window) for window in found.plan.shown],
        settings=SolutionSettings(max_seconds=config.max_seconds, null=config.null, seed=config.seed),
        tell=lambda done, total, note: tell("solve", done, total, note),
    )


def _residual(loaded: Loaded, info: ModuleInfo) -> Residual:
    """The matrices of a module's heads in residual space, or why there are none."""
    found = residual_heads(loaded.model, info)
    if not isinstance(found, str) and found[0].W_K.shape[0] != found[0].W_Q.shape[0]:
        return "its keys and queries are computed from vectors of different size"
    return found


def _wanted(config: InspectConfig, residual: dict[int, Residual]) -> dict[int, Wanted]:
    """Which problems the heads of each module are solved for; a space that was asked for must exist in one."""
    if not config.max_queries:
        return dict.fromkeys(residual, ())
    wanted = {
        index: wanted_solutions(config.space, has_residual=not isinstance(found, str))
        for index, found in residual.items()
    }
    if config.space == "auto" and len({isinstance(found, str) for found in residual.values()}) > 1:
        # What stands for a head stands for all, so that they can be compared: what every module has.
        wanted = {
            index: tuple(sorted(pairs, key=lambda pair: pair[0] == "residual")) for index, pairs in wanted.items()
        }
    if not any(wanted.values()):
        why = next(found for found in residual.values() if isinstance(found, str)).rstrip(".")
        raise InvalidInputError(f"inspect: space must be 'score' or 'auto' for this model, got 'residual': {why}.")
    return wanted


def _affordable(corpus: Corpus, asked: int) -> tuple[int, list[str]]:
    """How many queries a problem may have: a query of a long text has a row for each of its keys."""
    asked = asked or DEFAULT_QUERIES  # without problems, heads are still compared on as many
    # Repeated windows count once, as in the sample.
    lengths = {window.key: window.n_tokens for window in corpus.windows}.values()
    keys = max(1, round(sum(lengths) / (len(corpus.sides) * len(lengths))))
    most = max(1, min(asked, MOST_ROWS // keys))
    if most >= asked:
        return asked, []
    return most, [f"Problems have {most} queries, not {asked}: with {keys} keys each they have {MOST_ROWS:,} rows."]


def _one(found: Residual, head: int) -> ResidualHead | None:
    return None if isinstance(found, str) else found[head]


def _checked(loaded: Loaded, corpus: Corpus, path: Path) -> Check:
    """The check against the model's own attention, on the shortest windows; made once."""
    if path.exists():
        return Check(**read_json(path))
    shortest = sorted(range(len(corpus.windows)), key=lambda index: corpus.windows[index].n_tokens)[:4]
    (batch,) = batches(loaded, corpus, shortest, batch_size=4)
    check = check_against_eager(loaded.model, batch.inputs)
    write_json(path, vars(check))
    return check


def _fingerprint(loaded: Loaded, corpus: Corpus) -> dict[str, Any]:
    """What a run must share with the unfinished one that it continues: the model and the texts."""
    texts = hashlib.sha256()
    for window in corpus.windows:
        texts.update(window.key.to_bytes(8, "little"))
    weights = hashlib.sha256()
    for name, parameter in sorted(loaded.model.named_parameters()):
        weights.update(name.encode())
        weights.update(str(_bits(parameter.detach())).encode())
    return {"model": loaded.name, "weights": weights.hexdigest()[:16], "texts": texts.hexdigest()[:16]}


def _bits(values: torch.Tensor) -> int:
    """The sum of the numbers as whole numbers of their bits, which no order of summing changes, unlike their own."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = values.contiguous().view(whole[values.element_size()])
    return int(bits.sum(dtype=torch.int64))


def _check_folder(folder: RunFolder, overwrite: bool) -> None:
    """Make sure that the folder is new, or holds an unfinished run, or may be overwritten."""
    if not folder.path.exists():
        return
    if not folder.path.is_dir():
        raise InvalidInputError(f"inspect: output_dir must be a folder, got the file {folder.path}.")
    if folder.holds_other_files:
        raise InvalidInputError(
            f"inspect: output_dir {folder.path} must be new, or a run of attsvm; it holds other files."
        )
    if folder.is_complete and not overwrite:
        raise InvalidInputError(
            f"inspect: output_dir {folder.path} holds a finished run; choose another folder or overwrite it."
        )


def _check_same(folder: RunFolder, settings: dict[str, Any], overwrite: bool) -> None:
    """Make sure that an unfinished run in the folder is this one."""
    if not overwrite and folder.config_file.exists() and not _same_run(folder, settings):
        raise InvalidInputError(
            f"inspect: output_dir {folder.path} holds an unfinished run with other settings, model or texts, or of "
            "another version of attsvm; choose another folder or overwrite it."
        )


def _same_run(folder: RunFolder, settings: dict[str, Any]) -> bool:
    """Whether the unfinished run in the folder has these settings, model, texts and version; a damaged one has not."""
    try:
        there = folder.read_config()
    except (RecordError, AttSVMError):
        return False
    # What another version left may be of another form, or mean something else.
    version = (there.get("versions") or {}).get("attsvm") == settings["versions"].get("attsvm")
    return version and all(there.get(name) == settings[name] for name in ("config", "input", "commit"))
