"""Our shards in the readers others use: webdataset, timm, and open_clip's way of joining lists."""

import io
import json
from collections import Counter
from pathlib import Path

import braceexpand
import numpy as np
import pytest
import webdataset
from PIL import Image
from timm.data.readers.reader_factory import create_reader
from torchvision.datasets import ImageFolder
from webdataset.writer import TarWriter

from shards.read.index import ShardIndex
from shards.write.verify import verify_shards
from shards.writer import write_shards
from tests.support.shards_fixtures import FOLDER, awkward_folder, make_folder


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("stock")
    root = make_folder(folder / "images", domains=("art", "guitars", "train"))
    return write_shards(root, folder / "shards", FOLDER, shard_size=7)


def stored(index: ShardIndex, domains: tuple[str, ...]) -> Counter[tuple[bytes, int]]:
    """What must come out: the image files of some domains with their labels."""
    root = index.root.parent / "images"
    return Counter(
        (Path(path).read_bytes(), label)
        for domain in domains
        for path, label in ImageFolder(str(root / domain)).samples
    )


def pixels(image: Image.Image) -> bytes:
    return np.asarray(image.convert("RGB")).tobytes()


def decoded(samples: Counter[tuple[bytes, int]]) -> Counter[tuple[bytes, int]]:
    found: Counter[tuple[bytes, int]] = Counter()
    for (data, label), count in samples.items():
        found[pixels(Image.open(io.BytesIO(data))), label] += count
    return found


def read_all(urls: str | list[str]) -> Counter[tuple[bytes, int]]:
    dataset = webdataset.WebDataset(urls, shardshuffle=False).to_tuple("jpg;png", "cls")
    return Counter((image, int(label)) for image, label in dataset)


def braces(index: ShardIndex, domain: str) -> str:
    count = sum(shard.file.startswith(f"folder-{domain}-") for shard in index.shards)
    return f"{index.root}/folder-{domain}-{{000000..{count - 1:06d}}}.tar"


@pytest.mark.parametrize("domain", ["art", "guitars", "train"])
def test_webdataset_reads_a_brace_list(index: ShardIndex, domain: str) -> None:
    assert read_all(braces(index, domain)) == stored(index, (domain,))


def test_brace_lists_joined_as_open_clip_does(index: ShardIndex) -> None:
    both = f"{braces(index, 'art')}::{braces(index, 'train')}"
    expected = stored(index, ("art", "train"))
    assert read_all(both) == expected
    urls = [url for part in both.split("::") for url in braceexpand.braceexpand(part)]
    assert read_all(urls) == expected
    assert sum(expected.values()) == 38


@pytest.mark.parametrize(
    ("split", "domains"),
    [
        ("train", ("art", "guitars", "train")),
        ("art", ("art",)),
        ("env1", ("guitars",)),  # timm takes a name with "tar" in it for a file name
        ("env2", ("train",)),  # the name of the whole set
        ("folder-art-{000000..000002}.tar|18", ("art",)),
    ],
)
@pytest.mark.parametrize("is_training", [False, True])
def test_timm_reads_the_splits(
    index: ShardIndex, split: str, domains: tuple[str, ...], is_training: bool
) -> None:
    reader = create_reader("wds/", str(index.root), split=split, is_training=is_training)
    expected = decoded(stored(index, domains))
    assert len(reader) == sum(expected.values())
    assert Counter((pixels(image), int(label)) for image, label in reader) == expected


def test_bytes_are_those_of_webdatasets_own_writer(index: ShardIndex) -> None:
    path = index.root / index.shards[1].file
    again = io.BytesIO()
    with TarWriter(again, encoder=False, mtime=0) as writer:
        for sample in webdataset.WebDataset([str(path)], shardshuffle=False):
            writer.write({name: sample[name] for name in sample if name not in META})
    assert again.getvalue() == path.read_bytes()


META = {"__url__", "__local_path__"}
OTHER_FIELDS = {*META, "__key__", "cls", "json"}


def test_awkward_names_come_out_whole(tmp_path: Path) -> None:
    root = awkward_folder(tmp_path / "images")
    index = write_shards(root, tmp_path / "out", FOLDER, shard_size=7)
    urls = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    assert len(urls) == len(index.shards) == 3 * 5
    found: dict[str, dict[int, dict[str, object]]] = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        about = json.loads(sample["json"])
        image = [sample[name] for name in sample if name not in ("cls", "json") and name[0] != "_"]
        assert len(image) == 1
        assert {"jpg", "png", "webp", "tif", "bmp"} >= sample.keys() - OTHER_FIELDS
        found.setdefault(about["domain"], {})[about["index"]] = {
            "image": image[0],
            "label": int(sample["cls"]),
            "path": about["path"],
            "class_name": about["class_name"],
            "key": sample["__key__"],
        }
    for env, domain in enumerate(index.domains):
        reference = ImageFolder(str(root / domain))
        assert sorted(found[domain]) == list(range(index.num_samples(env)))
        for rank, (path, label) in enumerate(reference.samples):
            sample = found[domain][rank]
            assert sample["image"] == Path(path).read_bytes()
            assert root / str(sample["path"]) == Path(path)
            assert sample["label"] == label
            assert sample["class_name"] == reference.classes[label]
            assert index.read(env, rank) == (sample["key"], sample["image"], label)
    assert verify_shards(index, deep=True).problems == []
