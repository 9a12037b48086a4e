"""Pictures that look alike are found, and no others."""

import io

import numpy as np
import pytest
from PIL import Image

from shards.config import DataConfig
from shards.opening import open_shards
from shards.pixels.image_file import glance
from shards.pixels.likeness import GREY_SIZE, difference_hash, look_alikes


def scene(seed: int) -> Image.Image:
    """A picture of random blobs."""
    random = np.random.RandomState(seed)
    small = random.randint(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((240, 200), Image.Resampling.BICUBIC)


def grey(image: Image.Image, kind: str = "PNG", **options: int) -> np.ndarray:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return glance(file.getvalue(), GREY_SIZE).grey


def test_the_same_picture_in_other_sizes_and_formats() -> None:
    scenes = [scene(seed) for seed in range(40)]
    pictures = [grey(image) for image in scenes]
    pictures += [grey(image.resize((97, 81)), "JPEG", quality=60) for image in scenes[:20]]
    pictures += [grey(scenes[3].resize((640, 480)), "WEBP"), grey(scenes[3].convert("L"))]
    groups = [group.tolist() for group in look_alikes(np.stack(pictures))]
    assert groups == [[n, n + 40] if n != 3 else [3, 43, 60, 61] for n in range(20)]


def test_similar_drawings_are_not_the_same_picture() -> None:
    index = open_shards(DataConfig())
    glances = [glance(index.read(0, place).image, GREY_SIZE) for place in range(200)]
    assert {(found.format, found.size) for found in glances} == {("PNG", (32, 32))}
    assert look_alikes(np.stack([found.grey for found in glances])) == []


def test_few_and_flat_pictures() -> None:
    flat = np.full((1, *GREY_SIZE[::-1]), 200, np.uint8)
    assert look_alikes(flat[:0]) == look_alikes(flat) == []
    assert [group.tolist() for group in look_alikes(np.repeat(flat, 3, 0))] == [[0, 1, 2]]
    assert look_alikes(np.concatenate([flat, flat // 2])) == []
    ramp = np.tile(np.arange(9, dtype=np.uint8), (1, 8, 1))
    assert difference_hash(np.concatenate([flat, ramp])).tolist() == [0, 2**64 - 1]


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="of no known format"):
        glance(b"<html>", GREY_SIZE)
    file = io.BytesIO()
    scene(0).save(file, "JPEG")
    with pytest.raises(ValueError, match="more than max_pixels = 100 allows"):
        glance(file.getvalue(), GREY_SIZE, max_pixels=100)
    assert glance(file.getvalue()[:-500], GREY_SIZE).size == (240, 200), "as far as it goes"
