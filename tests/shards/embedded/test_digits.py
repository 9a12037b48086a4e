import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.config import DataConfig
from shards.embedded.digits import default_cache, draw_digits, embedded_shards, encode_png, scans
from shards.embedded.drawing import STYLES, draw
from shards.errors import DataConfigError
from shards.opening import open_shards
from shards.read.index import ShardIndex
from shards.write.verify import verify_shards
from shards.writer import main

REPOSITORY = Path(__file__).resolve().parents[3]
PIXELS_SHA256 = "c320eced4cee669bae13ab704636dd8672a7eaa5a34bbfebd252c49bfcb6249c"
INDEX_SHA256 = "342d0384640f1528cbfa636334a0e5c7197cbe0969271110a9a637c4e6aa267e"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def index(cache: Path) -> ShardIndex:
    return ShardIndex.load(embedded_shards(cache))


def test_domains_classes_and_counts(index: ShardIndex) -> None:
    assert index.dataset == "digits"
    assert index.domains == tuple(STYLES)
    assert index.domains[-1] == "rotated"
    assert index.classes == tuple("0123456789")
    assert [index.num_samples(env) for env in range(6)] == [300, 300, 300, 299, 299, 299]
    for env in range(6):
        assert np.bincount(index.labels(env), minlength=10).min() >= 20
    assert verify_shards(index, deep=True).problems == []


def test_golden_pixels() -> None:
    """Drawn in integers only: the same on every machine and under every library version."""
    digest = hashlib.sha256()
    for number, pixels in enumerate(scans()[0]):
        digest.update(draw(pixels, tuple(STYLES)[number % 6], number).tobytes())
    assert digest.hexdigest() == PIXELS_SHA256


def test_golden_index(index: ShardIndex) -> None:
    """The whole set, byte for byte: PNGs are stored uncompressed, so zlib plays no part."""
    assert index.sha256 == INDEX_SHA256


def test_images_are_what_was_drawn(index: ShardIndex, tmp_path: Path) -> None:
    draw_digits(tmp_path)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert len(files) == 1797
    pixels, labels = scans()
    for number in (0, 601, 1202, 3, 1000, 1505, 1796):
        domain = index.domains[number % 6]
        path = f"{domain}/{labels[number]}/{number:04d}.png"
        rank = [f for f in files if f.startswith(domain + "/")].index(path)
        sample = index.read(index.domain_number(domain), rank)
        assert sample.label == labels[number]
        assert sample.image == (tmp_path / path).read_bytes()
        with Image.open(io.BytesIO(sample.image)) as image:
            assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))
            assert np.array_equal(np.array(image), draw(pixels[number], domain, number))


def test_png_of_any_small_shape() -> None:
    picture = np.random.RandomState(0).randint(0, 256, (5, 9, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(encode_png(picture))) as image:
        assert np.array_equal(np.array(image), picture)


def test_styles_differ_strongly() -> None:
    """The mean picture of each style, told apart by colour, sharpness, variety or border."""
    pixels, _ = scans()
    marks = {}
    for style in STYLES:
        pictures = np.stack([draw(p, style, i) for i, p in enumerate(pixels[:60])]).astype(float)
        colour = np.ptp(pictures.mean(axis=(1, 2)), axis=1).mean()
        sharpness = 3 * np.abs(np.diff(pictures, axis=2)).mean()
        variety = 2 * pictures.mean(axis=(1, 2, 3)).std()
        marks[style] = np.array([colour, sharpness, variety, pictures[:, 0].mean()])
    names = list(marks)
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            assert np.abs(marks[one] - marks[other]).max() > 15, (one, other)


def contrast(picture: np.ndarray) -> np.ndarray:
    """How far each place is from the border's colour, at 16 x 16, standardised."""
    back = np.median(picture[[0, -1]].reshape(-1, 3), axis=0)
    away = np.abs(picture - back).sum(axis=2).reshape(16, 2, 16, 2).mean(axis=(1, 3)).ravel()
    return (away - away.mean()) / away.std()


@pytest.mark.parametrize("style", list(STYLES))
def test_digits_stay_legible(style: str) -> None:
    """The most similar of 500 drawings mostly shows the same digit; chance is 10 %."""
    pixels, labels = scans()
    marks = np.stack([contrast(draw(pixels[i], style, i).astype(float)) for i in range(600)])
    nearest = (marks[500:] @ marks[:500].T).argmax(axis=1)
    right = (labels[:500][nearest] == labels[500:600]).mean()
    assert right > 0.6


def test_second_use_is_free(cache: Path, index: ShardIndex) -> None:
    stamp = (index.root / "index.json").stat().st_mtime_ns
    assert embedded_shards(cache) == index.root
    assert (index.root / "index.json").stat().st_mtime_ns == stamp
    assert sorted(p.name for p in cache.iterdir()) == [index.root.name, f"{index.root.name}.lock"]


def test_two_processes_at_once(tmp_path: Path, index: ShardIndex) -> None:
    code = (
        "from shards import embedded_shards, ShardIndex\n"
        "print(ShardIndex.load(embedded_shards()).sha256)"
    )
    environment = {**os.environ, "MOA_CACHE": str(tmp_path / "deep" / "cache")}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in running:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.strip() == index.sha256


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MOA_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "moa-trainer"
    monkeypatch.setenv("MOA_CACHE", "~/mine")
    assert default_cache() == tmp_path / "mine"


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataConfigError, match=r"MOA_CACHE: the cache folder .* cannot be written"):
        embedded_shards(tmp_path / "file" / "cache")


def test_open_shards(
    cache: Path, index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOA_CACHE", str(cache))
    assert open_shards(DataConfig()).sha256 == index.sha256
    assert open_shards(DataConfig(root=str(index.root))).sha256 == index.sha256
    with pytest.raises(
        DataConfigError, match=r"data.dataset = 'folder': the shard set in .* holds"
    ):
        open_shards(DataConfig(dataset="folder", root=str(index.root)))
    with pytest.raises(DataConfigError, match=r"data.root is not set: dataset 'folder'"):
        open_shards(DataConfig(dataset="folder"))
    assert main(["--dataset", "digits", "--out", str(tmp_path / "out")]) == 0
    assert ShardIndex.load(tmp_path / "out").sha256 == index.sha256
