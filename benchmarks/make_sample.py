"""Make the sample text that ships with attsvm from the movie-review ratings in vaderSentiment 0.5.

Usage::

    pip download --no-deps --no-binary :all: vaderSentiment==0.5      # vaderSentiment-0.5.zip; unzip it
    python benchmarks/make_sample.py vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz

The rule is stated in ``src/attsvm/data/samples/README.md``. The choice is by SHA-256, so that it depends on no
random number library: the same archive gives the same file, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import tarfile
from pathlib import Path

MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
TARGET = Path(__file__).resolve().parents[1] / "src/attsvm/data/samples/movie-reviews.tsv"
SEED = 0
PER_CLASS = 500
MIN_RATING = 1.0
MIN_WORDS, MAX_WORDS = 5, 40


def rated_sentences(archive: Path) -> list[tuple[float, str]]:
    """All (mean rating, sentence) pairs of the archive, in its order."""
    with tarfile.open(archive) as tar:
        member = tar.extractfile(MEMBER)
        if member is None:
            raise SystemExit(f"{archive} has no {MEMBER}")
        lines = member.read().decode("utf-8").split("\n")
    rows = (line.rstrip("\r").split("\t") for line in lines if line.strip())
    return [(float(rating), text.strip()) for _, rating, text in rows]


def is_clean(rating: float, text: str) -> bool:
    """True for a clearly rated sentence of ordinary length whose characters survived the original processing."""
    return (
        abs(rating) >= MIN_RATING
        and MIN_WORDS <= len(text.split()) <= MAX_WORDS
        and text.isprintable()
        and "  " not in text  # two blanks stand where the archive lost a dash
        and not set('"\ufffd') & set(text)
    )


def choose(rows: list[tuple[float, str]]) -> list[tuple[str, str]]:
    """The sample as (label, text): per class the sentences with the smallest hashes, in order of the hash."""
    counts: dict[str, int] = {}
    for _, text in rows:
        counts[text.casefold()] = counts.get(text.casefold(), 0) + 1
    clean = [(rating, text) for rating, text in rows if is_clean(rating, text) and counts[text.casefold()] == 1]
    clean.sort(key=lambda row: hashlib.sha256(f"{SEED}:{row[1]}".encode()).hexdigest())
    kept = {"positive": 0, "negative": 0}
    sample = []
    for rating, text in clean:
        label = "positive" if rating > 0 else "negative"
        if kept[label] < PER_CLASS:
            kept[label] += 1
            sample.append((label, text))
    return sample


def main() -> None:
    """Write the sample next to its README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="hutto_ICWSM_2014.tar.gz")
    sample = choose(rated_sentences(parser.parse_args().archive))
    lines = ["label\ttext", *(f"{label}\t{text}" for label, text in sample)]
    TARGET.write_bytes(("\n".join(lines) + "\n").encode("utf-8"))


if __name__ == "__main__":
    main()
