"""DINOv2 ViT-S/14 with real weights against transformers and the ONNX file it came from, on a photograph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from attsvm.models import Vision, from_pretrained, save_pretrained
from weights.convert import dinov2_file
from weights.parity import check_double, check_single

pytestmark = pytest.mark.reference
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("sklearn.datasets")
Image = pytest.importorskip("PIL.Image")

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def flower(side: int) -> Tensor:
    """The dahlia of scikit-learn as the model was trained to see it: (1, 3, side, side)."""
    picture = Image.fromarray(datasets.load_sample_image("flower.jpg")).resize((side, side), Image.Resampling.BICUBIC)
    pixels = (np.asarray(picture, dtype=np.float64) / 255 - MEAN) / DEVIATION
    return torch.tensor(pixels).permute(2, 0, 1)[None].contiguous()


def read_theirs(folder: Path, dtype: torch.dtype = torch.float32, kernel: str = "sdpa") -> Any:
    return transformers.AutoModel.from_pretrained(
        folder, dtype=dtype, attn_implementation=kernel, local_files_only=True
    ).eval()


@pytest.fixture(scope="module")
def picture() -> Tensor:
    return flower(518)


@torch.no_grad()
def test_hidden_states(dinov2: Path, picture: Tensor) -> None:
    found, expected = {}, {}
    for dtype in (torch.float32, torch.float64):
        x = picture.to(dtype)
        found[dtype] = from_pretrained(dinov2, dtype=dtype)(x).hidden
        expected[dtype] = read_theirs(dinov2, dtype)(x).last_hidden_state
    assert found[torch.float32].shape == (1, 1 + 37 * 37, 384)
    exact = expected[torch.float64]
    check_double(found[torch.float64], exact)
    check_single(found[torch.float32], expected[torch.float32], exact)


@torch.no_grad()
def test_patterns_of_all_layers(dinov2: Path, picture: Tensor) -> None:
    x = picture.float()
    expected = read_theirs(dinov2, kernel="eager")(x, output_attentions=True).attentions
    found = from_pretrained(dinov2)(x, weights=True).weights["encoder"]
    assert len(found) == len(expected) == 12
    for one, other in zip(found, expected):
        assert one.shape == (1, 6, 1370, 1370)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_flower_is_what_it_looks_at(dinov2: Path, picture: Tensor) -> None:
    """The class token looks at the dahlia, in the middle of the picture, rather than at the leaves around it."""
    patterns = from_pretrained(dinov2)(picture.float(), weights=True).weights["encoder"]
    seen = patterns[-1][0, :, 0, 1:].mean(0).view(37, 37)
    assert seen[9:28, 9:28].mean() > 2 * seen.mean()


@torch.no_grad()
def test_there_and_back(dinov2: Path, tmp_path: Path) -> None:
    ours = from_pretrained(dinov2)
    assert isinstance(ours, Vision)
    save_pretrained(ours, tmp_path)
    again, report = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True, local_files_only=True)
    assert not any(report.values()), report
    before = read_theirs(dinov2)
    assert ours.n_parameters == ours.config.n_parameters == before.num_parameters() == 22_056_192
    for name, tensor in before.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@torch.no_grad()
def test_the_file_it_came_from_says_the_same(dinov2: Path) -> None:
    """ONNX's own evaluator, in NumPy, on the graph up to the last normalisation; its pictures have 224 pixels."""
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator
    from onnx.utils import Extractor

    whole, last = onnx.load(dinov2_file()), "/backbone/layernorm/Add_1_output_0"
    whole.graph.value_info.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    backbone = Extractor(whole).extract_model(["input_image"], [last])
    x = flower(224).float()
    (found,) = ReferenceEvaluator(backbone).run(None, {"input_image": x.numpy()})
    single, exact = (read_theirs(dinov2, dtype)(x.to(dtype)).last_hidden_state for dtype in (x.dtype, torch.float64))
    check_single(torch.tensor(found), single, exact)
