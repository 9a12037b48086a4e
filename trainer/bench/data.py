"""What the data stream costs: images per CPU-second against other ways, start-up, and resume.

Everything runs in this process on synthetic JPEGs of a photograph's size. CPU time counts, since
loader processes share a node's cores; divide a node's need of images by these figures to get cores.
"""

import itertools
import statistics
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import datasets, transforms

import shards
from shards import ShardIndex, decode_image
from shards.datasets import dataset_spec
from shards.stream.batches import undisturbed
from shards.writer import write_shards
from trainer.bench.timing import Comparison, Work, in_turns

DOMAINS, CLASSES, PER_CLASS = ("art", "photo"), ("cat", "dog"), 40
STEPS, PER_DOMAIN = 5, 16  # of the stream in one round
IMAGES = STEPS * PER_DOMAIN * len(DOMAINS)
RESUMED_AT = (10, 10_000, 1_000_000)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DATA_CONFIG: Mapping[str, Any] = {  # bilinear as in DomainBed
    "input_size": (3, 224, 224), "interpolation": "bilinear", "mean": MEAN, "std": STD,
}  # fmt: skip


def measure(rounds: int) -> dict[str, Comparison]:
    """Medians over rounds in which every variant runs once.

    These are images per CPU-second with their ratio to the first variant, and CPU milliseconds of
    starting (from a set's folder to the first batch) and of resuming (from an opened set).
    """
    # One thread for torch, so that CPU time does not depend on the machine's size.
    with tempfile.TemporaryDirectory() as folder, undisturbed():
        images = make_images(Path(folder) / "images")
        index = write_shards(images, Path(folder) / "shards", dataset_spec("folder"))
        title = f"data: {IMAGES} JPEGs of 400 to 600 px to 224 px, DomainBed's augmentation"
        start = {"local set": lambda: _first_batch(ShardIndex.load(index.root))}
        resume = {f"step {step:,}": partial(_first_batch, index, step) for step in RESUMED_AT}
        return {
            title: throughput(works(index, images), rounds),
            "data: start to first batch": _milliseconds(start, rounds),
            "data: resumed, to first batch": _milliseconds(resume, rounds),
        }


def make_images(root: Path) -> Path:
    """An image folder of smooth shapes with some noise, about 70 KB a file."""
    random = np.random.RandomState(0)
    for domain, name, number in itertools.product(DOMAINS, CLASSES, range(PER_CLASS)):
        width, height = random.randint(400, 601, size=2)
        coarse = random.randint(0, 256, (8, 8, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height)))  # bicubic
        noisy = np.clip(smooth + random.normal(0, 9, smooth.shape), 0, 255).astype(np.uint8)
        path = root / domain / name / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(path, quality=90)
    return root


def works(index: ShardIndex, images: Path) -> dict[str, Work]:
    """Ways to turn the same number of images into training tensors, the bare loop first."""
    whole = shards.train_transform(DATA_CONFIG, "domainbed")
    half = shards.loader_transform(DATA_CONFIG, "domainbed")
    files = _files_of(_stream(index, whole), images)
    size = PER_DOMAIN * len(DOMAINS)
    batches = [files[first : first + size] for first in range(0, IMAGES, size)]

    def bare() -> None:
        for batch in batches:
            torch.stack([whole(decode_image(path.read_bytes())) for path in batch])

    def ours(transform: Any, **options: Any) -> Work:
        def work() -> None:
            for _ in _stream(index, transform, **options).loader(0, STEPS):
                pass

        return work

    return {
        "bare loop: read, decode, augment, stack": bare,
        "our stream": ours(whole),
        "our stream, colours left to the device": ours(half),
        "our stream, decode: pil": ours(whole, decoder=shards.Decoder("pil")),
        "webdataset's pipeline, our decode and augment": _webdataset(index, whole),
        "DomainBed's ImageFolder": _image_folder(images),
    }


def throughput(variants: Mapping[str, Work], rounds: int) -> Comparison:
    """Images per CPU-second of each variant, taking turns; ratios are to the first."""
    seconds = _cpu_seconds(variants, rounds)
    first = next(iter(seconds.values()))
    return {
        name: {
            "images_per_cpu_s": IMAGES / statistics.median(values),
            "ratio": statistics.median(b / a for a, b in zip(values, first, strict=True)),
        }
        for name, values in seconds.items()
    }


def _milliseconds(variants: Mapping[str, Work], rounds: int) -> Comparison:
    seconds = _cpu_seconds(variants, rounds)
    return {name: {"cpu_ms": 1000 * statistics.median(s)} for name, s in seconds.items()}


def _cpu_seconds(variants: Mapping[str, Work], rounds: int) -> dict[str, list[float]]:
    times = in_turns(variants, rounds, torch.device("cpu"))
    return {name: [each.cpu for each in found] for name, found in times.items()}


def _stream(index: ShardIndex, transform: Any, **options: Any) -> shards.DomainStream:
    return shards.DomainStream(
        index, sources=range(len(DOMAINS)), batch_per_domain=PER_DOMAIN, seed=0, trial_seed=0,
        transform=transform, **options,
    )  # fmt: skip


def _files_of(stream: shards.DomainStream, images: Path) -> list[Path]:
    """The image files that the stream's first steps read, in order."""
    sorted_files = {name: sorted((images / name).rglob("*.jpg")) for name in DOMAINS}
    keys = [key for step in range(STEPS) for key in stream.keys(step)]
    pairs = (key.rpartition("-") for key in keys)
    return [sorted_files[domain][int(place)] for domain, _, place in pairs]


def _webdataset(index: ShardIndex, transform: Any) -> Work:
    import webdataset

    urls = [str(index.root / shard.file) for shard in index.shards]
    samples = webdataset.WebDataset(urls, shardshuffle=False).shuffle(100).to_tuple("jpg", "cls")
    images = samples.map_tuple(lambda data: transform(decode_image(data)), int)
    batches = images.batched(PER_DOMAIN * len(DOMAINS)).repeat()

    def work() -> None:
        for _ in itertools.islice(batches, STEPS):
            pass

    return work


def _image_folder(images: Path) -> Work:
    """DomainBed's chain: Pillow throughout, one dataset per domain, draws with replacement."""
    loaders = []
    for name in DOMAINS:
        folder = datasets.ImageFolder(images / name, transform=domainbed_chain())
        draws = torch.utils.data.RandomSampler(folder, replacement=True, num_samples=10**6)
        loaders.append(iter(torch.utils.data.DataLoader(folder, PER_DOMAIN, sampler=draws)))

    def work() -> None:
        for _ in range(STEPS):
            for loader in loaders:
                next(loader)

    return work


def domainbed_chain(side: int = 224) -> transforms.Compose:
    """DomainBed's augmentation, from a Pillow image to float32 [3, side, side]."""
    return transforms.Compose([
        transforms.RandomResizedCrop(side, scale=(0.7, 1.0)), transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.3, 0.3, 0.3, 0.3), transforms.RandomGrayscale(),
        transforms.ToTensor(), transforms.Normalize(MEAN, STD),
    ])  # fmt: skip


def _first_batch(index: ShardIndex, step: int = 0) -> None:
    stream = _stream(index, shards.train_transform(DATA_CONFIG, "domainbed"))
    next(iter(stream.loader(step, step + 1)))
