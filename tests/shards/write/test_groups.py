"""Sets whose split keeps groups of images together."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from shards.errors import DamagedDataError
from shards.read.index import ShardIndex
from shards.read.naming import index_bytes
from shards.stream.evaluation import split_places
from shards.stream.split import split_indices
from shards.writer import main, write_shards
from tests.support.shards_fixtures import FOLDER, damage, image_bytes, stream_of
from tests.support.shards_server import remote_config

PATTERN = "(p[0-9]+)_[0-9]+"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures of each of eight patients a class, the same patients in every domain."""
    root = tmp_path_factory.mktemp("patients") / "images"
    for domain in ("clinic", "home", "street", "work"):
        for label, class_name in enumerate(("ill", "well")):
            folder = root / domain / class_name
            folder.mkdir(parents=True)
            for number in range(40):
                name = f"p{10 * label + number % 8}_{number}.png"
                (folder / name).write_bytes(image_bytes(number, size=(6, 6)))
    return root


@pytest.fixture(scope="module")
def grouped(images: Path) -> ShardIndex:
    return write_shards(images, images.parent / "grouped", FOLDER, group_by=PATTERN)


@pytest.fixture(scope="module")
def plain(images: Path) -> ShardIndex:
    return write_shards(images, images.parent / "plain", FOLDER)


def patients(index: ShardIndex, domain: int, places: np.ndarray) -> set[str]:
    """From the listing: 40 pictures a class, sorted by name."""
    names = [sorted(f"p{10 * label + n % 8}_{n}.png" for n in range(40)) for label in (0, 1)]
    return {[*names[0], *names[1]][place].partition("_")[0] for place in places.tolist()}


def test_no_patient_is_on_both_sides(grouped: ShardIndex, plain: ShardIndex) -> None:
    settings = {"trial_seed": 1, "holdout_fraction": 0.2}
    inside: set[str] = set()
    outside: set[str] = set()
    for domain in range(4):
        places = split_places(grouped, domain, "out", **settings)
        assert len(places) == 15  # 16 of 80 are wanted, and a patient has five
        outside |= patients(grouped, domain, places)
        inside |= patients(grouped, domain, split_places(grouped, domain, "in", **settings))
        default = split_places(plain, domain, "out", **settings)
        assert default.tolist() == split_indices(80, 1, domain)[1].tolist()
    assert len(outside) == 3
    assert not inside & outside
    trained = stream_of(grouped)
    places = np.concatenate([trained.slots(step).places for step in range(60)])
    assert patients(grouped, 0, places) == inside
    assert trained.fingerprint()["index_sha256"] != stream_of(plain).fingerprint()["index_sha256"]


def test_the_set_records_it_and_stays_checked(
    images: Path, grouped: ShardIndex, plain: ShardIndex, tmp_path: Path
) -> None:
    assert (grouped.group_by, plain.group_by) == (PATTERN, None)
    for domain in range(4):
        row = grouped.table(domain)[list(plain.table(0).dtype.names or ())]
        assert row.tolist() == plain.table(domain).tolist()
    for shard in plain.shards:
        there = (grouped.root / shard.file).read_bytes()
        assert there == (plain.root / shard.file).read_bytes()
    out = str(grouped.root)
    assert main(["--out", out, "--verify", "--deep", "--jobs=1"]) == 0
    argv = ["--root", str(images), "--out", out, "--jobs=1", "--quick"]
    assert main([*argv, "--group_by", PATTERN]) == 0
    assert main([*argv, "--group_by", "p[0-9]+"]) == 73, "another set"
    assert main(argv) == 73
    remote = ShardIndex.load(grouped.root.as_uri(), remote_config(tmp_path))
    assert remote.group_by == PATTERN
    for change in (
        lambda text: text.replace("(p[0-9]+)", "(q[0-9]+)"),
        lambda text: text.replace('"group_by"', '"grouped_by"', 2),
        lambda text: index_bytes({}).decode(),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(out, copy)
        altered = change((copy / "index.json").read_text())
        (copy / "index.json").write_text(altered)
        with pytest.raises(DamagedDataError):
            ShardIndex.load(copy)
        shutil.rmtree(copy)
    shutil.copytree(out, copy)
    damage(copy / "folder-home.npy", 200)
    with pytest.raises(DamagedDataError, match="sha256 differs"):
        ShardIndex.load(copy)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("(", "--group_by '(': no regular expression (missing ), unterminated subpattern"),
        ("zebra", "found in none of the 320 paths, such as 'clinic/ill/p0_0.png'; give a"),
        ("", "--group_by '': must be one line of up to 500 characters"),
        ("a\nb", "must be one line"),
        ("p" * 501, "must be one line of up to 500 characters"),
    ],
)
def test_bad_patterns(
    images: Path, tmp_path: Path, pattern: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    assert main(["--root", str(images), "--out", str(out), "--group_by", pattern]) == 2
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert said in line
    assert "\n" not in line
    assert not out.exists()
    assert main(["--out", str(out), "--group_by", "p"]) == 2


def test_what_is_not_found_stands_alone(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    index = write_shards(images, tmp_path / "out", FOLDER, group_by="ill/p[0-3]_|street|work")
    assert (
        "not found in 120 of 320 paths; each of these images is a group of its own" in caplog.text
    )
    assert "all images of 'work' are in one group, so it cannot be split" in caplog.text
    assert len(set(index.table(0)["group"].tolist())) == 4 + 60
    assert len(split_places(index, 3, "out", trial_seed=0, holdout_fraction=0.2)) == 0
