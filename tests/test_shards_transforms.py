import io

import numpy as np
import pytest
import torch
from PIL import Image
from shards_fixtures import DATA_CONFIG, image_bytes
from torchvision.transforms.v2 import functional

from shards.errors import DataConfigError
from shards.transforms import (
    _ColourJitter,
    decode_image,
    eval_transform,
    shift_hue,
    train_transform,
    undecodable_placeholder,
)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    with io.BytesIO() as stream:
        image.save(stream, kind, **options)
        return stream.getvalue()


def smooth(height: int = 40, width: int = 56) -> np.ndarray:
    down, across = np.mgrid[0:height, 0:width]
    return np.stack([down * 6, across * 4, 255 - down * 3 - across], axis=2).astype(np.uint8)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "PPM", "GIF"])
def test_decodes_what_pillow_decodes(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(smooth()), kind, **options)
    pixels = decode_image(data)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    with Image.open(io.BytesIO(data)) as image:
        reference = np.array(image.convert("RGB"))
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), reference)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_agrees_with_pillow(mode: str, progressive: bool) -> None:
    image = Image.fromarray(smooth()).convert(mode)
    data = encoded(image, "JPEG", quality=90, progressive=progressive)
    with Image.open(io.BytesIO(data)) as opened:
        reference = np.array(opened.convert("RGB")).astype(int)
    difference = np.abs(decode_image(data).permute(1, 2, 0).numpy() - reference)
    assert difference.max() <= 2
    assert difference.mean() < 0.05


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16"])
def test_png_modes_become_rgb(mode: str) -> None:
    grey = smooth()[:, :, 0]
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(smooth()).convert(mode)
    pixels = decode_image(encoded(image, "PNG"))
    assert pixels.shape == (3, 40, 56)


def test_exif_rotation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(smooth()), "JPEG", exif=exif)
    assert decode_image(data).shape == (3, 40, 56)


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>404</html>", b"\xff\xd8\xff\xe0 nothing", b"\x89PNG\r\n\x1a\n"],
)
def test_unreadable_bytes_raise_one_kind_of_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a readable image"):
        decode_image(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_truncated_images_are_refused(kind: str) -> None:
    data = image_bytes(0, kind, (64, 64))
    with pytest.raises(ValueError, match="not a readable image"):
        decode_image(data[: len(data) // 2])


def test_evaluation_resizes_the_whole_image_and_normalises() -> None:
    image = torch.zeros((3, 30, 60), dtype=torch.uint8)
    image[0] = 255
    result = eval_transform(DATA_CONFIG)(image)
    assert result.shape == (3, 24, 24)
    assert result.dtype == torch.float32
    expected = [(1 - 0.5) / 0.2, -0.4 / 0.3, -0.3 / 0.4]
    torch.testing.assert_close(result.mean(dim=(1, 2)), torch.tensor(expected))
    corner = torch.zeros((3, 24, 48), dtype=torch.uint8)
    corner[:, :, :2] = 255  # a crop to the centre would lose this edge
    result = eval_transform(DATA_CONFIG)(corner)
    assert result[0, 12, 0] > result[0, 12, 12] + 1


@pytest.mark.parametrize("augment", ["domainbed", "no_flip", "none"])
def test_training_transform_is_a_function_of_the_seed(augment: str) -> None:
    transform = train_transform(DATA_CONFIG, augment)  # type: ignore[arg-type]
    image = torch.from_numpy(smooth()).permute(2, 0, 1).contiguous()
    results = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        results.append(transform(image))
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0], results[1]) == (augment == "none")
    assert results[0].shape == (3, 24, 24)
    assert results[0].dtype == torch.float32


def test_only_domainbed_mirrors() -> None:
    image = torch.zeros((3, 24, 24), dtype=torch.uint8)
    image[:, :, :6] = 255  # bright left edge

    def left_is_brighter(augment: str) -> set[bool]:
        transform = train_transform(DATA_CONFIG, augment)  # type: ignore[arg-type]
        found = set()
        for seed in range(40):
            torch.manual_seed(seed)
            result = transform(image).mean(dim=(0, 1))
            if abs(result[0] - result[-1]) > 0.5:
                found.add(bool(result[0] > result[-1]))
        return found

    assert left_is_brighter("no_flip") == {True}
    assert left_is_brighter("domainbed") == {True, False}


@pytest.mark.parametrize("shift", [-0.5, -0.31, -0.001, 0.0, 0.1, 0.25, 0.5])
def test_hue_equals_torchvision(shift: float) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 50, 60), dtype=torch.uint8, generator=generator)
    image[:, :5] = image[:1, :5]  # some greys, which have no hue
    image[:, 5:10, ::2] = 0
    image[1:, 10:20] = image[:2, 10:20]  # ties between channels
    reference = functional.adjust_hue(image, shift).int()
    difference = (shift_hue(image, shift).int() - reference).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.01


def test_jitter_equals_torchvision_step_by_step() -> None:
    image = torch.from_numpy(smooth()).permute(2, 0, 1).contiguous()
    orders = set()
    for seed in range(20):
        torch.manual_seed(seed)
        result = _ColourJitter()(image)
        torch.manual_seed(seed)
        order = torch.randperm(4).tolist()
        draws = torch.rand(4).tolist()
        orders.add(tuple(order))
        reference = image
        for step in order:
            factor = 0.7 + 0.6 * draws[step]
            reference = [
                lambda x, f: functional.adjust_brightness(x, f),
                lambda x, f: functional.adjust_contrast(x, f),
                lambda x, f: functional.adjust_saturation(x, f),
                lambda x, f: functional.adjust_hue(x, f - 1),
            ][step](reference, factor)
        difference = (result.int() - reference.int()).abs().float()
        assert difference.mean() < 0.1
        assert difference.max() <= 6  # one level of hue, stretched by later contrast
    assert len(orders) > 5


def test_bad_settings_name_what_is_legal() -> None:
    with pytest.raises(DataConfigError, match=r"augment = 'auto': must be domainbed, no_flip or"):
        train_transform(DATA_CONFIG, "auto")  # type: ignore[arg-type]
    with pytest.raises(DataConfigError, match=r"interpolation = 'lanczos' .* nearest, bilinear"):
        eval_transform({**DATA_CONFIG, "interpolation": "lanczos"})


def test_timm_data_configs_fit() -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    config = timm.data.resolve_model_data_config(model)
    image = undecodable_placeholder()
    assert eval_transform(config)(image).shape == (3, 224, 224)
    assert train_transform(config, "domainbed")(image).shape == (3, 224, 224)
