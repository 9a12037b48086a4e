import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.config import DataConfig
from shards.datasets import dataset_spec
from shards.embedded.digits import default_cache, embedded_shards, unpack_digits
from shards.errors import DataConfigError
from shards.opening import open_shards
from shards.read.index import ShardIndex
from shards.write.verify import verify_shards
from shards.writer import main

REPOSITORY = Path(__file__).resolve().parents[3]
PIXELS_SHA256 = "c320eced4cee669bae13ab704636dd8672a7eaa5a34bbfebd252c49bfcb6249c"
STYLES = dataset_spec("digits").domains or ()
INDEX_SHA256 = "342d0384640f1528cbfa636334a0e5c7197cbe0969271110a9a637c4e6aa267e"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def index(cache: Path) -> ShardIndex:
    return ShardIndex.load(embedded_shards(cache))


def test_domains_classes_and_counts(index: ShardIndex) -> None:
    assert index.dataset == "digits"
    assert index.domains == STYLES
    assert index.domains[-1] == "rotated"
    assert index.classes == tuple("0123456789")
    assert [index.num_samples(env) for env in range(6)] == [300, 300, 300, 299, 299, 299]
    for env in range(6):
        assert np.bincount(index.labels(env), minlength=10).min() >= 20
    assert verify_shards(index, deep=True).problems == []


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[int, Path]]:
    """The image files by style, and there by their number in the whole collection."""
    folder = tmp_path_factory.mktemp("digits")
    unpack_digits(folder)
    return {
        style: {int(path.stem): path for path in sorted((folder / style).rglob("*.png"))}
        for style in STYLES
    }


def pixels_of(paths: Iterable[Path]) -> np.ndarray:
    return np.stack([np.array(Image.open(path)) for path in paths])


def test_golden_pixels(pictures: dict[str, dict[int, Path]]) -> None:
    files = [pictures[STYLES[number % 6]][number] for number in range(1797)]
    assert hashlib.sha256(pixels_of(files).tobytes()).hexdigest() == PIXELS_SHA256


def test_golden_index(index: ShardIndex) -> None:
    """The whole set, byte for byte: PNGs are stored uncompressed, so zlib plays no part."""
    assert index.sha256 == INDEX_SHA256


def test_images_are_the_shipped_files(
    index: ShardIndex, pictures: dict[str, dict[int, Path]]
) -> None:
    for env, style in enumerate(STYLES):
        files = sorted(pictures[style].values())
        assert len(files) == index.num_samples(env)
        for rank in range(0, len(files), 50):
            sample = index.read(env, rank)
            assert str(sample.label) == files[rank].parent.name
            assert sample.image == files[rank].read_bytes()
            with Image.open(io.BytesIO(sample.image)) as image:
                assert (image.format, image.mode, image.size) == ("PNG", "RGB", (32, 32))


def test_every_digit_is_drawn_as_it_was_scanned(pictures: dict[str, dict[int, Path]]) -> None:
    """The labels are scikit-learn's, and `coarse` shows its scans in four levels."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    for number, label in enumerate(bundle.target):
        assert pictures[STYLES[number % 6]][number].parent.name == str(label)
    for number, path in pictures["coarse"].items():
        levels = (bundle.images[number].astype(int) * 3 + 8) // 16
        squares = pixels_of([path])[0].astype(int).reshape(8, 4, 8, 4, 3)
        assert (squares == squares[:, :1, :, :1]).all()
        flat = squares[:, 0, :, 0]
        assert all(len(np.unique(flat[levels == level], axis=0)) <= 1 for level in range(4))
        assert len(np.unique(flat.reshape(64, 3), axis=0)) == len(np.unique(levels))


def test_styles_differ_strongly(pictures: dict[str, dict[int, Path]]) -> None:
    """The mean picture of each style, told apart by colour, sharpness, variety or border."""
    marks = {}
    for style in STYLES:
        drawn = pixels_of(list(pictures[style].values())[:60]).astype(float)
        colour = np.ptp(drawn.mean(axis=(1, 2)), axis=1).mean()
        sharpness = 3 * np.abs(np.diff(drawn, axis=2)).mean()
        variety = 2 * drawn.mean(axis=(1, 2, 3)).std()
        marks[style] = np.array([colour, sharpness, variety, drawn[:, 0].mean()])
    names = list(marks)
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            assert np.abs(marks[one] - marks[other]).max() > 15, (one, other)


def contrast(picture: np.ndarray) -> np.ndarray:
    """How far each place is from the border's colour, at 16 x 16, standardised."""
    back = np.median(picture[[0, -1]].reshape(-1, 3), axis=0)
    away = np.abs(picture - back).sum(axis=2).reshape(16, 2, 16, 2).mean(axis=(1, 3)).ravel()
    return (away - away.mean()) / away.std()


@pytest.mark.parametrize("style", STYLES)
def test_digits_stay_legible(style: str, pictures: dict[str, dict[int, Path]]) -> None:
    """The most similar of 240 drawings mostly shows the same digit; chance is 10 %."""
    files = [pictures[style][number] for number in sorted(pictures[style])]
    labels = np.array([int(path.parent.name) for path in files])
    marks = np.stack([contrast(picture) for picture in pixels_of(files).astype(float)])
    nearest = (marks[240:] @ marks[:240].T).argmax(axis=1)
    right = (labels[:240][nearest] == labels[240:]).mean()
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

    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("MOA_CACHE")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(DataConfigError, match=r"home directory\. Set MOA_CACHE to a folder"):
        default_cache()


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
