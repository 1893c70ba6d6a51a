"""Complete transformers from :mod:`attsvm.attention`, their checkpoints, generation, and the models they replaced."""

from __future__ import annotations

from attsvm.models.blocks import MLP, Block, BlockConfig, RMSNorm
from attsvm.models.decoder import Decoder, DecoderConfig, RotaryScaling
from attsvm.models.encoder import Encoder, EncoderConfig
from attsvm.models.generation import Generation, GenerationConfig, generate
from attsvm.models.output import ModelOutput
from attsvm.models.pretrained import from_pretrained, save_pretrained
from attsvm.models.recurrent import (
    AdditiveAttention,
    EncodedSource,
    LSTMConfig,
    LSTMLanguageModel,
    LSTMSeq2Seq,
    LSTMSeq2SeqConfig,
    LSTMState,
    RecurrentOutput,
)
from attsvm.models.seq2seq import Seq2Seq, Seq2SeqCache, Seq2SeqConfig
from attsvm.models.vision import Vision, VisionConfig

__all__ = [
    "AdditiveAttention",
    "Block",
    "BlockConfig",
    "Decoder",
    "DecoderConfig",
    "EncodedSource",
    "Encoder",
    "EncoderConfig",
    "Generation",
    "GenerationConfig",
    "LSTMConfig",
    "LSTMLanguageModel",
    "LSTMSeq2Seq",
    "LSTMSeq2SeqConfig",
    "LSTMState",
    "MLP",
    "ModelOutput",
    "RMSNorm",
    "RecurrentOutput",
    "RotaryScaling",
    "Seq2Seq",
    "Seq2SeqCache",
    "Seq2SeqConfig",
    "Vision",
    "VisionConfig",
    "from_pretrained",
    "generate",
    "save_pretrained",
]
