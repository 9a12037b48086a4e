"""Small image folders and shard sets for the tests of `shards`."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from shards.config import DataConfig
from shards.datasets import DatasetSpec, dataset_spec
from shards.opening import open_shards
from shards.pixels.transforms import train_transform
from shards.read.index import ShardIndex
from shards.stream.stream import DomainStream
from shards.writer import write_shards

FOLDER = dataset_spec("folder")
DATA_CONFIG = {
    "input_size": (3, 24, 24),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "interpolation": "bicubic",
}


def image_bytes(seed: int, kind: str = "PNG", size: tuple[int, int] = (20, 16)) -> bytes:
    """A random image file."""
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    with io.BytesIO() as stream:
        Image.fromarray(pixels).save(stream, kind)
        return stream.getvalue()


def make_folder(
    root: Path,
    domains: tuple[str, ...] = ("art", "photo", "sketch"),
    classes: tuple[str, ...] = ("cat", "dog"),
    per_class: int = 9,
) -> Path:
    """An image folder; domain number d has d more images in its first class than the others."""
    seed = 0
    for d, domain in enumerate(domains):
        for c, name in enumerate(classes):
            folder = root / domain / name
            folder.mkdir(parents=True)
            for number in range(per_class + (d if c == 0 else 0)):
                kind, suffix = (("PNG", "png"), ("JPEG", "jpg"))[number % 2]
                (folder / f"im{number:03d}.{suffix}").write_bytes(image_bytes(seed, kind))
                seed += 1
    return root


def awkward_folder(root: Path) -> Path:
    """Names that trip careless listings: case, dots, unicode, spaces, nesting, stray files."""
    names = [
        "b.JPG",
        "a.v2.jpeg",
        "A.png",
        "_z.webp",
        "ünïcode 1.PNG",
        "x y.TIF",
        "10.bmp",
        "9.bmp",
    ]
    kinds = {"jpg": "JPEG", "jpeg": "JPEG", "tif": "TIFF"}
    for domain in ("Real World", "real.world", "zürich"):
        for class_name in ("B c", "a.b", "Ä"):
            folder = root / domain / class_name
            for place, name in enumerate((*names, "deep/er/k.png", "deep.er/k.png", "Deep/k.jpg")):
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                suffix = name.rpartition(".")[2].lower()
                seed = hash_of(domain, class_name, place)
                path.write_bytes(image_bytes(seed, kinds.get(suffix, suffix.upper())))
            (folder / "notes.txt").write_text("not an image")
            (folder / "jpg").write_text("no extension")
            (folder / ".png.swp").write_text("swap file")
        (root / domain / "stray.jpg").write_bytes(image_bytes(1, "JPEG"))
    (root / "README.md").write_text("a file beside the domains")
    return root


def hash_of(*parts: object) -> int:
    return sum(ord(letter) * (place + 1) for place, letter in enumerate("|".join(map(str, parts))))


def make_set(folder: Path, shard_size: int = 8, **options: object) -> ShardIndex:
    """A shard set of such a folder."""
    make_folder(folder / "images", **options)  # type: ignore[arg-type]
    return write_shards(folder / "images", folder / "shards", FOLDER, shard_size=shard_size)


def few_digits(folder: Path, per_class: int) -> ShardIndex:
    """The first images of each embedded digit and style, as a set of its own."""
    embedded = open_shards(DataConfig())
    for env, domain in enumerate(embedded.domains):
        labels = embedded.labels(env)
        for label, name in enumerate(embedded.classes):
            target = folder / "images" / domain / name
            target.mkdir(parents=True)
            for rank in (labels == label).nonzero()[0][:per_class]:
                (target / f"{rank}.png").write_bytes(embedded.read(env, int(rank)).image)
    return write_shards(folder / "images", folder / "digits", dataset_spec("digits"))


def small_train_transform():
    """The training chain at 24 x 24."""
    return train_transform(DATA_CONFIG, "domainbed")


def pixels_only(image: torch.Tensor) -> torch.Tensor:
    """A transform without random numbers and without a resize."""
    return image.float()


def damage(path: Path, offset: int) -> None:
    """Flip one byte of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x20
    path.write_bytes(bytes(data))


def domain_folders(root: Path, spec: DatasetSpec, per_class: int = 1) -> Path:
    """A dataset's folders with made class names; the files are no images, the writer need not care.

    Domain d has d images more in its first class than in the others.
    """
    assert spec.domains is not None
    for d, domain in enumerate(spec.domains):
        for c in range(spec.num_classes or 0):
            folder = root / domain / f"class {c:03d}"
            folder.mkdir(parents=True)
            for number in range(per_class + (d if c == 0 else 0)):
                (folder / f"{number}.jpg").write_bytes(f"{domain} {c} {number}".encode())
    return root


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def stream_of(index: ShardIndex, **changes: object) -> DomainStream:
    settings: dict[str, object] = {
        "sources": [0, 1, 3],
        "batch_per_domain": 4,
        "seed": 5,
        "trial_seed": 1,
        "transform": small_train_transform(),
        **changes,
    }
    return DomainStream(index, **settings)  # type: ignore[arg-type]


def collect(stream: DomainStream, start: int, stop: int, world: int = 1, **options: int):
    """Global batches: the ranks' micro-batches put together; checks first_slot on the way."""
    ranks = [list(stream.loader(start, stop, rank, world, **options)) for rank in range(world)]
    pieces = options.get("accumulation", 1)
    batches = []
    for step in range(stop - start):
        parts = [part for rank in ranks for part in rank[step * pieces : (step + 1) * pieces]]
        slot = 0
        for part in parts:
            assert part.first_slot == slot
            slot += len(part.labels)
        assert slot == stream.global_batch
        batches.append(
            tuple(torch.cat([getattr(part, name) for part in parts]) for name in part._fields[:3])
        )
    return batches


def assert_equal(left: list, right: list) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
