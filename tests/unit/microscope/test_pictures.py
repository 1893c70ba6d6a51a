"""Pictures as patches: which patch is which, scaled as the model expects, small on the page."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attsvm.errors import InvalidInputError, UnsupportedError
from attsvm.microscope.corpus import read_corpus
from attsvm.microscope.loading import Loaded, load
from attsvm.microscope.pictures import picture_format, pixel_values, read_picture
from attsvm.microscope.windows import batches
from unit.microscope.tiny_tokenizers import tiny

pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")


def noise(height: int, width: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def with_processor(family: str, processor: Any, **given: Any) -> Loaded:
    return load(tiny(family, **given), processor)


def seen(loaded: Loaded, source: Any) -> torch.Tensor:
    return pixel_values([read_picture(source, picture_format(loaded), name="it")])[0]


@pytest.mark.parametrize(("family", "prefix"), [("vit", ["CLS"]), ("registers", ["CLS", "R1", "R2", "R3", "R4"])])
def test_tokens_are_the_patches_behind_the_class_token(family: str, prefix: list[str]) -> None:
    loaded = load(tiny(family))
    corpus = read_corpus(loaded, [noise(40, 60), noise(30, 30, 1)])
    piece = corpus.windows[0].source
    patches = [f"r{row}c{column}" for row in (1, 2, 3) for column in (1, 2, 3)]
    assert list(piece.tokens) == prefix + patches
    assert list(piece.special) == [True] * len(prefix) + [False] * 9
    assert set(piece.words) == {-1}
    assert corpus.names[len(prefix)] == "r1c1"
    assert [window.picture for window in corpus.windows] == [0, 1]
    assert corpus.windows[0].key != corpus.windows[1].key
    (batch,) = batches(loaded, corpus, [0, 1], batch_size=2)
    with torch.inference_mode():
        states = loaded.model(**batch.inputs).last_hidden_state
    assert states.shape[:2] == batch.ids["source"].shape == (2, len(piece))
    assert bool(batch.real["source"].all())
    for row, index in enumerate(batch.windows):
        (alone,) = batches(loaded, corpus, [index], batch_size=1)
        with torch.inference_mode():
            one = loaded.model(**alone.inputs).last_hidden_state[0]
        torch.testing.assert_close(states[row], one, rtol=0, atol=1e-5)


def test_the_patch_that_is_named_is_the_one_that_changes() -> None:
    loaded = load(tiny("vit"))
    picture = np.zeros((24, 24, 3), dtype=np.uint8)
    picture[8:16, 16:24] = 255
    corpus = read_corpus(loaded, [np.zeros_like(picture), picture])
    values = [next(iter(batches(loaded, corpus, [index], batch_size=1))).inputs["pixel_values"] for index in (0, 1)]
    with torch.inference_mode():
        black, white = (loaded.model.embeddings(pixels)[0] for pixels in values)
    changed = (black != white).any(-1).nonzero().flatten().tolist()
    assert [corpus.windows[0].source.tokens[at] for at in changed] == ["r2c3"]


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 24, "width": 24}, "resample": 2},
        {
            "size": {"shortest_edge": 28},
            "crop_size": {"height": 24, "width": 24},
            "do_center_crop": True,
            "resample": 3,
        },
        {"size": {"height": 24, "width": 24}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]},
        {"size": {"height": 24, "width": 24}, "do_normalize": False},
    ],
)
@pytest.mark.parametrize("shape", [(40, 60), (75, 31), (24, 24)])
@pytest.mark.reference
def test_pixels_are_those_of_the_processor_of_transformers(settings: dict[str, Any], shape: tuple[int, int]) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    processor = ViTImageProcessorPil(**settings)
    picture = noise(*shape)
    theirs = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0]
    as_object = seen(with_processor("vit", processor), picture)
    as_content = seen(with_processor("vit", processor.to_dict()), picture)
    torch.testing.assert_close(as_object, theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(as_content, as_object, rtol=0, atol=0)


def test_the_processor_beside_the_weights_is_read(tmp_path: Path) -> None:
    tiny("vit").save_pretrained(tmp_path)
    picture = noise(24, 24)
    without = load(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}', encoding="utf-8"
    )
    loaded = load(tmp_path)
    torch.testing.assert_close(seen(loaded, picture), torch.tensor(picture).permute(2, 0, 1) / 255)
    torch.testing.assert_close(seen(without, picture), torch.tensor(picture).permute(2, 0, 1) / 127.5 - 1)
    assert len(read_corpus(loaded, [picture]).notes) == 1
    assert "without a processor" in read_corpus(without, [picture]).notes[1]
    (tmp_path / "preprocessor_config.json").write_text("[", encoding="utf-8")
    with pytest.raises(InvalidInputError, match=r"preprocessor_config.json must be JSON"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp"])
def test_files_and_arrays_are_the_same_picture(kind: str, tmp_path: Path) -> None:
    loaded, picture = load(tiny("vit")), np.full((30, 30, 3), 77, dtype=np.uint8)
    file = tmp_path / f"a <b>.{kind}"
    Image.fromarray(picture).save(file)
    expected = seen(loaded, picture)
    for source in (file, str(file), Image.open(file), picture / 255.0, torch.tensor(picture)):
        torch.testing.assert_close(seen(loaded, source), expected, rtol=0, atol=0.03)
    assert read_corpus(loaded, [file]).texts == (f"a <b>.{kind}",)


def test_other_kinds_of_pixels(tmp_path: Path) -> None:
    loaded = load(tiny("vit"))
    grey = np.full((30, 30), 200, dtype=np.uint8)
    expected = seen(loaded, grey)
    assert expected.shape == (3, 24, 24)
    Image.fromarray(np.full((30, 30), 200 * 257, dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.dstack([grey] * 4)).save(tmp_path / "clear.png")
    for source in (tmp_path / "deep.png", tmp_path / "clear.png", grey[:, :, None], grey / 255.0):
        torch.testing.assert_close(seen(loaded, source), expected, rtol=0, atol=0)
    assert seen(load(tiny("vit", num_channels=1)), grey).shape == (1, 24, 24)


def test_a_camera_held_upright_gives_an_upright_picture(tmp_path: Path) -> None:
    picture = np.zeros((24, 24, 3), dtype=np.uint8)
    picture[:12] = 255  # the upper half, stored turned by a quarter
    image = Image.fromarray(np.rot90(picture))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    torch.testing.assert_close(seen(load(tiny("vit")), tmp_path / "turned.png"), seen(load(tiny("vit")), picture))


@pytest.mark.parametrize("shape", [(24, 24), (518, 518), (1200, 1600)])
def test_the_picture_of_the_page_is_small_and_what_the_model_saw(shape: tuple[int, int]) -> None:
    loaded = load(tiny("dinov2", image_size=504))
    (picture,) = read_corpus(loaded, [noise(*shape)]).pictures
    record = picture.record()
    assert (record["width"], record["height"], record["rows"], record["columns"]) == (504, 504, 63, 63)
    assert len(record["data"]) <= 60_000
    kind, content = record["data"].split(",")
    assert kind in ("data:image/png;base64", "data:image/jpeg;base64")
    shown = Image.open(io.BytesIO(base64.b64decode(content)))
    assert shown.width == shown.height <= 448


def test_a_small_picture_stays_as_it_is() -> None:
    (picture,) = read_corpus(load(tiny("vit")), [noise(24, 24)]).pictures
    data = picture.data().removeprefix("data:image/png;base64,")
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), picture.pixels)


def test_models_of_any_size_take_as_many_tokens_as_were_asked_for() -> None:
    loaded = load(tiny("dinov2", image_size=80))
    corpus = read_corpus(loaded, [noise(90, 70)], max_tokens=50)
    assert len(corpus.windows[0].source) == 37
    (batch,) = batches(loaded, corpus, [0], batch_size=1)
    with torch.inference_mode():
        assert loaded.model(**batch.inputs).last_hidden_state.shape[1] == 37
    with pytest.raises(InvalidInputError, match="max_tokens must be at least 10, the tokens of one picture, got 9"):
        read_corpus(load(tiny("vit")), [noise(9, 9)], max_tokens=9)


def test_models_without_a_regular_grid_are_refused() -> None:
    import transformers as hf

    with pytest.raises(UnsupportedError, match="must have a token for each of 64 patches in all layers, got swin"):
        read_corpus(load(tiny("swin")), [noise(32, 32)])
    model = hf.ResNetModel(hf.ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8))
    with pytest.raises(UnsupportedError, match="must cut pictures into patches, got resnet"):
        read_corpus(load(model), [noise(32, 32)])


def test_looking_for_the_grid_leaves_the_model_as_it_was() -> None:
    model = tiny("vit").train()
    read_corpus(load(model), [noise(24, 24)])
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((3, 24, 24)), r"must be \(height, width\) or .* got picture 0 of \(3, 24, 24\)"),
        (np.zeros((0, 24)), "must be"),
        (np.full((4, 4), np.nan), r"numbers in \[0, 1\]"),
        (np.full((4, 4), 7.0), r"numbers in \[0, 1\]"),
        (np.array([["a"]]), "must hold numbers"),
        (np.zeros((1, 200)), "must not be narrower than 1:50"),
        ("absent.png", r"absent.png must be a picture \(PNG, JPEG, ...\)"),
        ("A sentence " * 40, r"DATA must be pictures for this model; A sentence .{0,60}\.\.\. must be"),
        (object(), "must be"),
    ],
)
def test_what_is_no_picture_is_refused(source: Any, message: str) -> None:
    loaded = load(tiny("vit"), {"size": {"shortest_edge": 24}, "crop_size": 24})
    with pytest.raises(InvalidInputError, match=message):
        read_corpus(loaded, [source])


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    loaded = load(tiny("vit"))
    Image.fromarray(noise(50, 50)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("<svg onload='alert(1)'/>", encoding="utf-8")
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
    for name in ("cut.png", "text.png", "huge.png"):
        with pytest.raises(InvalidInputError, match=name):
            read_corpus(loaded, [tmp_path / name])
    with pytest.raises(InvalidInputError, match="targets must be left out"):
        read_corpus(loaded, [noise(9, 9)], targets=["a"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_std": [0.0, 1.0, 1.0]}, "image_std of the processor must not be 0"),
        ({"image_mean": ["a"]}, "image_mean of the processor must hold numbers"),
        ({"image_mean": [float("nan")]}, "image_mean of the processor must hold numbers"),
    ],
)
def test_a_damaged_processor_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        read_corpus(load(tiny("vit"), settings), [noise(24, 24)])
