"""``attsvm generate`` and ``attsvm translate``: text from pretrained checkpoints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from attsvm.cli.terminal import say
from attsvm.errors import InvalidInputError
from attsvm.experiments.generate_text import generate_text, read_texts
from attsvm.models.generation import GenerationConfig

__all__ = ["generate_command", "translate_command"]

Model = Annotated[
    str, typer.Argument(help="A folder with config.json and safetensors, a .gguf file, or the id of a model.")
]
Texts = Annotated[list[str] | None, typer.Option("--text", "-t", help="A text; repeatable.", show_default=False)]
TextFile = Annotated[Path | None, typer.Option(help="A file with a text on each line.", show_default=False)]
NewTokens = Annotated[int, typer.Option(help="Tokens to generate at most.")]
Beams = Annotated[int, typer.Option(help="Sequences that beam search keeps; 1 is greedy, or sampling.")]
LengthPenalty = Annotated[float, typer.Option(help="Power of the length by which beams are judged.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: tokens that were used become less likely.")]
Lookup = Annotated[
    int, typer.Option(help="Tokens guessed at once from earlier text and checked: quicker, the same text; 0 is off.")
]
BatchSize = Annotated[int, typer.Option(help="Texts at once.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the texts.")]


def generate_command(
    model: Model,
    text: Texts = None,
    text_file: TextFile = None,
    max_new_tokens: NewTokens = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; above 0 draws.")] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(help="Draw from so many of the likeliest tokens.", show_default=False)
    ] = None,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens with this probability in all.")] = 1.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    beams: Beams = 1,
    length_penalty: LengthPenalty = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends the generation; repeatable.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    lookup: Lookup = GenerationConfig.lookup,
    batch_size: BatchSize = 8,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Go on from texts with a pretrained decoder, or answer them with an encoder-decoder."""
    texts = read_texts(text or [], text_file, where="generate")
    _check_batch(batch_size, "generate")
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        beams=beams,
        length_penalty=length_penalty,
        seed=seed,
        lookup=lookup,
    )
    streams = not as_json and len(texts) == 1 and beams == 1
    result = generate_text(
        model,
        texts,
        config,
        where="generate",
        stop=stop or (),
        batch_size=batch_size,
        stream=_write if streams else None,
    )
    if streams:
        _write("\n")
    _show(model, result, as_json=as_json, quiet=quiet, written=streams)


def translate_command(
    model: Model,
    text: Texts = None,
    text_file: TextFile = None,
    prefix: Annotated[
        str, typer.Option(help="Put before each text, as T5 wants it: 'translate English to German: '.")
    ] = "",
    max_new_tokens: NewTokens = 128,
    beams: Beams = 4,
    length_penalty: LengthPenalty = 1.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    batch_size: BatchSize = 8,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Translate texts (or summarise or answer them) with a pretrained encoder-decoder, by beam search."""
    texts = read_texts(text or [], text_file, where="translate")
    _check_batch(batch_size, "translate")
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, beams=beams, length_penalty=length_penalty, repetition_penalty=repetition_penalty
    )
    result = generate_text(
        model, texts, config, where="translate", prefix=prefix, batch_size=batch_size, needs_source=True
    )
    _show(model, result, as_json=as_json, quiet=quiet, written=False)


def _check_batch(batch_size: int, where: str) -> None:
    if batch_size < 1:
        raise InvalidInputError(f"{where}: --batch-size must be at least 1, got {batch_size}.")


def _write(piece: str) -> None:
    """A piece of text, at once."""
    sys.stdout.write(piece)
    sys.stdout.flush()


def _show(model: str, result: dict[str, Any], *, as_json: bool, quiet: bool, written: bool) -> None:
    if as_json:
        print(json.dumps({"model": model, **result}))
    elif not written:
        for one in result["outputs"]:
            _write(one["text"] + "\n")
    if not quiet and not as_json:
        count = sum(len(one["tokens"]) for one in result["outputs"])
        say(f"{count} tokens in {result['seconds']:.1f} s, {result['tokens_per_second']:.1f} a second")
