"""Data: labelled texts, arrays, and token vectors of texts."""

from __future__ import annotations

from attsvm.data.arrays import LabelledArrays, read_arrays_file
from attsvm.data.cache import EmbeddingCache, default_cache_dir
from attsvm.data.embedded_text import EmbeddedText
from attsvm.data.embeddings import embed_text
from attsvm.data.model_files import default_model_path
from attsvm.data.problems import FileProblem, read_problem
from attsvm.data.random_embedding import random_embedding
from attsvm.data.registry import load_data
from attsvm.data.sample import load_sample, sample_names
from attsvm.data.text import LabelledText, read_labelled_text, read_text_column, subsample

__all__ = [
    "EmbeddedText",
    "EmbeddingCache",
    "FileProblem",
    "LabelledArrays",
    "LabelledText",
    "default_cache_dir",
    "default_model_path",
    "embed_text",
    "load_data",
    "load_sample",
    "random_embedding",
    "read_arrays_file",
    "read_labelled_text",
    "read_problem",
    "read_text_column",
    "sample_names",
    "subsample",
]
