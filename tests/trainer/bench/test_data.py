"""The data benchmark compares like with like; what it measures is never asserted."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from shards import decode_image
from shards.datasets import dataset_spec
from shards.writer import write_shards
from trainer.bench import data as bench_data


def test_all_variants_make_the_same_number_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_data, "PER_CLASS", 12)
    monkeypatch.setattr(bench_data, "PER_DOMAIN", 4)
    monkeypatch.setattr(bench_data, "IMAGES", 40)
    images = bench_data.make_images(tmp_path / "images")
    sizes = {tuple(decode_image(path.read_bytes()).shape[1:]) for path in images.rglob("*.jpg")}
    assert all(400 <= side <= 600 for size in sizes for side in size)
    index = write_shards(images, tmp_path / "shards", dataset_spec("folder"))
    decoded: list[int] = []

    def counting(data: bytes) -> Tensor:
        decoded.append(len(data))
        return decode_image(data)

    stream = bench_data._stream(index, lambda pixels: pixels)
    files = bench_data._files_of(stream, images)
    keys = [key for step in range(bench_data.STEPS) for key in stream.keys(step)]
    for key, path in zip(keys, files, strict=True):
        domain, _, rank = key.rpartition("-")
        sample = index.read(index.domain_number(domain), int(rank))
        assert sample.image == path.read_bytes()
    monkeypatch.setattr(bench_data, "decode_image", counting)
    works = bench_data.works(index, images)
    works["bare loop: read, decode, augment, stack"]()
    assert decoded == [path.stat().st_size for path in files]
    decoded.clear()
    works["webdataset's pipeline, our decode and augment"]()
    assert len(decoded) >= 40
    table = bench_data.throughput(works, 1)
    assert table[next(iter(works))]["ratio"] == 1
    assert all(columns["images_per_cpu_s"] > 0 for columns in table.values())  # type: ignore[operator]


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with bench_data.undisturbed():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
