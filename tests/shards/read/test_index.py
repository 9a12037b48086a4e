import json
import pickle
from pathlib import Path

import numpy as np
import pytest

import shards.read.shard_reader
from shards.errors import DamagedDataError, DataConfigError
from shards.read.index import ShardIndex
from shards.write.verify import verify_shards
from tests.support.shards_fixtures import damage, make_set


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return make_set(tmp_path)


def test_attributes(index: ShardIndex, tmp_path: Path) -> None:
    assert index.root == tmp_path / "shards"
    assert index.dataset == "folder"
    assert index.domains == ("art", "photo", "sketch")
    assert index.classes == ("cat", "dog")
    assert [index.num_samples(env) for env in range(3)] == [18, 19, 20]
    assert index.labels(1).tolist() == [0] * 10 + [1] * 9
    assert index.labels(1).dtype == np.int64
    assert len(index.sha256) == 64
    again = ShardIndex.load(str(index.root))
    assert again.sha256 == index.sha256


def test_reads_the_original_bytes(index: ShardIndex, tmp_path: Path) -> None:
    sample = index.read(1, 3)
    assert sample.image == (tmp_path / "images/photo/cat/im003.jpg").read_bytes()
    assert (sample.key, sample.label) == ("photo-0000003", 0) == (index.key(1, 3), 0)
    last = index.read(2, 19)
    assert last.image == (tmp_path / "images/sketch/dog/im008.png").read_bytes()


def test_few_files_stay_open(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards.read.shard_reader, "_MAX_OPEN_SHARDS", 2)
    first = [index.read(env, rank) for env in range(3) for rank in range(18)]
    assert len(index.reader._open_files) == 2
    index.close()
    assert [index.read(env, rank) for env in range(3) for rank in range(18)] == first


def test_survives_pickling(index: ShardIndex) -> None:
    sample = index.read(0, 0)
    copy = pickle.loads(pickle.dumps(index))
    assert copy.read(0, 0) == sample
    assert copy.sha256 == index.sha256


def test_names_that_are_no_text_are_refused(index: ShardIndex) -> None:
    """As older writers stored them; nothing could draw or print them after training."""
    content = json.loads((index.root / "index.json").read_text())
    for section in ("classes", "domains"):
        changed = json.loads(json.dumps(content).replace('"cat"', '"c\\udce9t"'))
        if section == "domains":
            changed = {**content, "domains": [{**content["domains"][0], "name": "c\udce9t"}]}
        del changed["digests"]
        (index.root / "index.json").write_text(json.dumps(changed))
        with pytest.raises(DataConfigError, match=r"the name 'c\\udce9t' .* rename its folders"):
            ShardIndex.load(index.root)


def test_domain_number(index: ShardIndex) -> None:
    assert [index.domain_number(name) for name in index.domains] == [0, 1, 2]
    with pytest.raises(
        DataConfigError,
        match=r"data.held_out = 'sketsh': .*legal: art, photo, sketch \(did you mean 'sketch'\?\)",
    ):
        index.domain_number("sketsh")
    with pytest.raises(DataConfigError, match=r"legal: art, photo, sketch$"):
        index.domain_number("zzz")


def test_no_shard_set(tmp_path: Path) -> None:
    with pytest.raises(DataConfigError, match=r"does not exist; make .*`python -m shards.writer"):
        ShardIndex.load(tmp_path / "none")
    (tmp_path / "x").mkdir()
    with pytest.raises(DataConfigError, match=r"holds no index\.json; make .* --out /.*/x`$"):
        ShardIndex.load(tmp_path / "x")
    (tmp_path / "x" / ".cache").mkdir()
    with pytest.raises(DataConfigError, match=r"holds no index\.json; make .* --out /.*/x`$"):
        ShardIndex.load(tmp_path / "x")
    images = tmp_path / "x" / "my images"
    (images / "photo" / "cat").mkdir(parents=True)
    with pytest.raises(DataConfigError, match=r"holds no index\.json but other folders, as an ima"):
        ShardIndex.load(images)
    with pytest.raises(DataConfigError, match=rf"--root '{images}' --out my_shards` and give that"):
        ShardIndex.load(images)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataConfigError, match="does not exist"):
        ShardIndex.load(tmp_path / "file")


def test_other_format_version(index: ShardIndex) -> None:
    path = index.root / "index.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "format_version": 99}))
    with pytest.raises(DataConfigError, match="format version 99, but this program reads version"):
        ShardIndex.load(index.root)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format_version": 1}', "not json"])
def test_damaged_index(index: ShardIndex, text: str) -> None:
    (index.root / "index.json").write_text(text)
    with pytest.raises(DamagedDataError, match=r"index\.json"):
        ShardIndex.load(index.root)


@pytest.mark.parametrize("keep", [0, 512, 5000, -1])
def test_truncated_shard_is_found_when_opening(index: ShardIndex, keep: int) -> None:
    path = index.root / "folder-art-000001.tar"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(
        DamagedDataError, match=rf"art-000001\.tar: \d+ bytes, expected {len(data)}"
    ):
        ShardIndex.load(index.root)


def test_missing_shard_and_table(index: ShardIndex) -> None:
    (index.root / "folder-photo-000000.tar").rename(index.root / "away")
    with pytest.raises(DamagedDataError, match=r"photo-000000\.tar: No such file"):
        ShardIndex.load(index.root)
    (index.root / "away").rename(index.root / "folder-photo-000000.tar")
    (index.root / "folder-photo.npy").unlink()
    with pytest.raises(DamagedDataError, match=r"folder-photo\.npy: cannot be read"):
        ShardIndex.load(index.root)


def test_flipped_byte_in_a_table_is_found_when_opening(index: ShardIndex) -> None:
    damage(index.root / "folder-art.npy", 200)
    with pytest.raises(DamagedDataError, match=r"folder-art\.npy: sha256 differs"):
        ShardIndex.load(index.root)


def test_every_flipped_payload_byte_is_found_when_reading(index: ShardIndex) -> None:
    row = index.table(0)[5]
    path = index.root / index.shards[int(row["shard"])].file
    for offset in (0, int(row["size"]) // 2, int(row["size"]) - 1):
        damage(path, int(row["offset"]) + offset)
        with pytest.raises(
            DamagedDataError, match=rf"{path.name}: sample art-0000005 at offset {row['offset']} "
        ):
            ShardIndex.load(index.root).read(0, 5)
        told = "sample art-0000005 (art/cat/im005.jpg): crc32 differs"
        assert any(told in line for line in verify_shards(index, deep=False).problems)
        damage(path, int(row["offset"]) + offset)
    assert index.read(0, 5).key == "art-0000005"
    assert verify_shards(index, deep=True).problems == []


def test_shard_cut_short_while_open(index: ShardIndex) -> None:
    row = index.table(0)[5]
    path = index.root / index.shards[int(row["shard"])].file
    index.read(0, 5)
    with path.open("r+b") as stream:
        stream.truncate(int(row["offset"]) + 10)
    with pytest.raises(DamagedDataError, match="10 bytes found"):
        index.read(0, 5)
    assert verify_shards(index, deep=False).problems


def test_verify_finds_flipped_headers_and_labels(index: ShardIndex) -> None:
    path = index.root / "folder-sketch-000000.tar"
    size = path.stat().st_size
    whole = path.read_bytes()
    for offset in (*range(0, 3000, 150), size // 2):
        damage(path, offset)
        assert any(
            "sha256 differs" in line for line in verify_shards(index, deep=False).problems
        ), offset
        path.write_bytes(whole)
    label = whole.index(b"1", whole.index(b".cls") + 500)
    assert label
    assert verify_shards(index, deep=False).problems == []
