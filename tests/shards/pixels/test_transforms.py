import io
import itertools
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional

from shards.config import ResolvedAugment
from shards.errors import DataConfigError
from shards.pixels.colour import apply_colour, apply_colour_batch, draw_colour, shift_hue
from shards.pixels.decoding import Decoder, decode_image, undecodable_placeholder
from shards.pixels.transforms import (
    HalfDone,
    eval_transform,
    finish_batch,
    loader_transform,
    train_transform,
)
from tests.support.shards_fixtures import DATA_CONFIG, image_bytes


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


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_png_modes_become_rgb(mode: str) -> None:
    pixels = decode_image(encoded(Image.fromarray(smooth()).convert(mode), "PNG"))
    assert pixels.shape == (3, 40, 56)


def test_exif_rotation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(smooth()), "JPEG", exif=exif)
    assert decode_image(data).shape == (3, 40, 56)


@pytest.mark.parametrize(
    "data", [b"", b"<html>404</html>", b"\xff\xd8\xff\xe0 nothing", b"\x89PNG\r\n\x1a\n"]
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


@pytest.mark.parametrize("augment", get_args(ResolvedAugment))
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


@pytest.mark.parametrize(
    ("augment", "last"), [("crop_flip", []), ("randaugment", [v2.RandAugment()])]
)
def test_chains_without_colours_are_torchvisions(augment: str, last: list[Any]) -> None:
    """CLIPood's crop and mirroring; RandAugment as torchvision has it, nothing of it set."""
    chain = v2.Compose(
        [v2.RandomResizedCrop(24, (0.7, 1.0), interpolation=InterpolationMode.BICUBIC),
         v2.RandomHorizontalFlip(), *last, v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
         v2.Normalize(DATA_CONFIG["mean"], DATA_CONFIG["std"])]  # type: ignore[arg-type]
    )  # fmt: skip
    transform = train_transform(DATA_CONFIG, augment)  # type: ignore[arg-type]
    tensor = torch.from_numpy(smooth()).permute(2, 0, 1).contiguous()
    for seed in range(20):
        for pixels in (tensor, Image.fromarray(smooth())):
            results = []
            for made in (transform, chain):
                torch.manual_seed(seed)
                results.append(made(pixels))
            torch.testing.assert_close(*results, rtol=0, atol=1e-5)


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
    difference = (shift_hue(image.float(), shift).int() - reference).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 0.01


def test_jitter_equals_torchvision_step_by_step() -> None:
    image = torch.from_numpy(smooth()).permute(2, 0, 1).contiguous()
    orders = set()
    for seed in range(20):
        torch.manual_seed(seed)
        draw = draw_colour()
        draw[-1] = 0
        result = apply_colour(image, draw)
        torch.manual_seed(seed)
        order = torch.randperm(4).tolist()
        draws = torch.rand(4).tolist()
        orders.add(tuple(order))
        steps = [
            functional.adjust_brightness,
            functional.adjust_contrast,
            functional.adjust_saturation,
            lambda x, f: functional.adjust_hue(x, f - 1),
        ]
        reference = image
        for step in order:
            reference = steps[step](reference, 0.7 + 0.6 * draws[step])
        difference = (result.int() - reference.int()).abs().float()
        assert difference.mean() < 0.1
        assert difference.max() <= 6  # one level of hue, stretched by later contrast
        steps[3] = lambda x, _, turn=float(draw[7]): shift_hue(x.float(), turn).to(torch.uint8)
        exact = image
        for step in order:
            exact = steps[step](exact, float(draw[4 + step]))
        assert torch.equal(result, exact.float()), "nothing but the hue differs"
    assert len(orders) > 5


def test_colours_are_sometimes_grey() -> None:
    image = torch.from_numpy(smooth()).permute(2, 0, 1).contiguous()
    grey = 0
    for seed in range(200):
        torch.manual_seed(seed)
        draw = draw_colour()
        result = apply_colour(image, draw)
        grey += int((result == result[:1]).all())
        assert bool((result == result[:1]).all()) == bool(draw[-1])
    assert 8 < grey < 35


def coloured(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draws for a batch, what they make of it one by one, and all at once."""
    torch.manual_seed(0)
    draws = torch.stack([draw_colour() for _ in images])
    alone = torch.stack(
        [apply_colour(image, draw) for image, draw in zip(images, draws, strict=True)]
    )
    return draws, alone, apply_colour_batch(images, draws)


def test_a_whole_batch_is_coloured_as_its_images_one_by_one() -> None:
    images = torch.randint(0, 256, (96, 3, 12, 14), dtype=torch.uint8)
    before = images.clone()
    draws, alone, batch = coloured(images)
    assert torch.equal(images, before)
    assert {tuple(order) for order in draws[:, :4].tolist()} == set(
        itertools.permutations((0.0, 1.0, 2.0, 3.0))
    )
    assert draws[:, -1].sum() > 3
    difference = (alone.int() - batch.int()).abs()
    assert (difference > 0).float().mean() < 0.001, "only where a rounding falls the other way"
    assert difference.max() <= 3


class OnTheDevice(TorchDispatchMode):
    """Counts what is computed on the meta device, and what is copied to it or from it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.copies = 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
        places = {tensor.is_meta for tensor in tensors if tensor.dim()}
        self.copies += len(places) == 2
        self.operations += places == {True} and not func.is_view
        return result


def test_a_device_is_told_once_what_to_do_with_a_batch() -> None:
    draws = torch.stack([draw_colour() for _ in range(20)])
    images = torch.empty(20, 3, 224, 224, dtype=torch.uint8, device="meta")
    apply_colour_batch(images, draws)  # brings constants
    with OnTheDevice() as seen:
        apply_colour_batch(images, draws)
    assert seen.copies == 1
    assert seen.operations < 250, "for 20 images, 16 groups of which are treated alike"


@pytest.mark.parametrize("augment", get_args(ResolvedAugment))
def test_finishing_on_the_device_equals_the_loader(augment: str) -> None:
    whole = train_transform(DATA_CONFIG, augment)  # type: ignore[arg-type]
    half = loader_transform(DATA_CONFIG, augment)  # type: ignore[arg-type]
    levels = loader_transform(DATA_CONFIG, augment, colours=True)  # type: ignore[arg-type]
    alone, images, draws = [], [], []
    for seed in range(60):
        image = decode_image(image_bytes(seed, "PNG", (40, 30)))
        torch.manual_seed(seed)
        alone.append(whole(image))
        after = torch.rand(1)
        torch.manual_seed(seed)
        made = half(image)
        assert isinstance(made, HalfDone)
        assert torch.equal(torch.rand(1), after), "both draw equally often"
        images.append(made.image)
        draws.append(made.draw)
        for pixels in (image, Image.fromarray(image.permute(1, 2, 0).numpy())):
            torch.manual_seed(seed)
            there, left = levels(pixels)
            assert (there.dtype, len(left)) == (torch.uint8, 0)
            torch.manual_seed(seed)
            assert torch.equal(finish_batch(there[None], left[None], DATA_CONFIG)[0], whole(pixels))
    result = finish_batch(torch.stack(images), torch.stack(draws), DATA_CONFIG)
    assert result.dtype == torch.float32
    difference = (result - torch.stack(alone)).abs() * 255 * 0.2  # in grey levels, or less
    assert difference.max() <= 3.01
    assert (difference > 0.01).float().mean() < 0.001


def test_pillow_way_equals_the_tensor_way_to_a_few_levels() -> None:
    """The same draws, another resize and other roundings."""
    transform = train_transform(DATA_CONFIG, "domainbed")
    data = encoded(Image.fromarray(smooth()), "PNG")
    differences = []
    for seed in range(40):
        results = []
        for decode in ("auto", "pil"):
            torch.manual_seed(seed)
            results.append(transform(Decoder(decode)(data).pixels))  # type: ignore[arg-type]
        differences.append((results[0] - results[1]).abs() * 255 * torch.tensor(
            DATA_CONFIG["std"]
        )[:, None, None])  # fmt: skip
    levels = torch.stack(differences)
    assert levels.mean() < 1.2, "Pillow keeps hue and saturation in whole levels"
    assert levels.quantile(0.99) < 8


def test_pillow_way_is_torchvisions_own_chain_on_a_pillow_image() -> None:
    data = encoded(Image.fromarray(smooth()), "PNG")
    pixels = Decoder("pil")(data).pixels
    assert isinstance(pixels, Image.Image)
    reference = v2.Compose(
        [v2.Resize((24, 24), InterpolationMode.BICUBIC), v2.PILToTensor(),
         v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))]
    )  # fmt: skip
    assert torch.equal(eval_transform(DATA_CONFIG)(pixels), reference(pixels))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("decode", ["auto", "pil"])
def test_incomplete_files_are_kept_or_refused(kind: str, decode: str) -> None:
    data = image_bytes(3, kind, (120, 160))
    cut = data[: len(data) * 2 // 3]
    found = Decoder(decode, "keep")(cut)  # type: ignore[arg-type]
    assert found.truncated
    whole = np.asarray(Decoder("pil")(data).pixels)
    pixels = np.asarray(found.pixels if decode == "pil" else found.pixels.permute(1, 2, 0))  # type: ignore[union-attr]
    assert (pixels[:8] == whole[:8]).all(), "what is there is used"
    assert (pixels[-24:] == pixels[-1, -1]).all(), "what is missing is one colour"
    with pytest.raises(ValueError, match="not a readable image"):
        Decoder(decode, "substitute")(cut)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not a readable image"):
        Decoder(decode, "keep")(b"<html>404</html>")  # type: ignore[arg-type]
    assert not Decoder(decode)(data).truncated  # type: ignore[arg-type]
    assert not ImageFile.LOAD_TRUNCATED_IMAGES, "Pillow's switch is back where it was"


def test_bad_settings_name_what_is_legal() -> None:
    with pytest.raises(DataConfigError, match=r"augment = 'auto': must be one of domainbed"):
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
