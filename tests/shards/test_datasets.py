"""The registry, and what `open_shards` refuses (a wrong class map, a stray domain, an edit)."""

import json
from pathlib import Path
from typing import Any

import pytest

from shards.config import DataConfig
from shards.datasets import DATASETS, dataset_spec
from shards.errors import DamagedDataError, DataConfigError
from shards.opening import check_dataset, open_shards
from shards.read.index import ShardIndex
from shards.read.layout import section_digest
from shards.write.verify import verify_shards
from shards.writer import main, write_shards
from tests.support.shards_fixtures import domain_folders, make_folder

PACS = DATASETS["pacs"]


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    folder = tmp_path_factory.mktemp("pacs")
    return write_shards(domain_folders(folder / "PACS", PACS), folder / "shards", PACS)


@pytest.mark.parametrize(
    ("name", "num_domains", "num_classes"),
    [
        ("pacs", 4, 7),
        ("vlcs", 4, 5),
        ("officehome", 4, 65),
        ("terraincognita", 4, 10),
        ("domainnet", 6, 345),
    ],
)
def test_registry_has_the_published_protocol(name: str, num_domains: int, num_classes: int) -> None:
    spec = dataset_spec(name)
    assert spec.domains is not None
    assert (len(spec.domains), spec.num_classes) == (num_domains, num_classes)
    assert list(spec.domains) == sorted(spec.domains)  # DomainBed numbers folders in this order
    assert DataConfig(dataset=name, root="somewhere").problems() == []
    assert DataConfig(dataset=name).resolved_augment() == "domainbed"
    for numbers in (spec.samples, spec.duplicates):
        assert numbers is None or len(numbers) == num_domains


@pytest.mark.parametrize(
    ("name", "total"),
    [("pacs", 9991), ("vlcs", 10729), ("officehome", 15588), ("domainnet", 586575)],
)
def test_documented_sizes_add_up_to_the_published_totals(name: str, total: int) -> None:
    assert sum(DATASETS[name].samples or ()) == total


def test_opens_what_is_configured(pacs: ShardIndex) -> None:
    index = open_shards(DataConfig(dataset="pacs", root=str(pacs.root)))
    assert index.domains == PACS.domains
    assert index.sha256 == pacs.sha256


def test_refuses_another_dataset(pacs: ShardIndex, tmp_path: Path) -> None:
    for other in ("vlcs", "folder", "digits"):
        with pytest.raises(
            DataConfigError, match=f"data.dataset = '{other}': .* holds 'pacs'; set data.dataset to"
        ):
            open_shards(DataConfig(dataset=other, root=str(pacs.root)))
    images = make_folder(tmp_path / "images")
    write_shards(images, tmp_path / "out", DATASETS["folder"])
    with pytest.raises(DataConfigError, match=r"holds 'folder'; set data\.dataset to that or da"):
        open_shards(DataConfig(dataset="pacs", root=str(tmp_path / "out")))
    assert main(["--out", str(pacs.root), "--dataset", "vlcs", "--verify"]) == 2
    assert main(["--out", str(pacs.root), "--dataset", "pacs", "--verify"]) == 0
    assert main(["--out", str(pacs.root), "--verify"]) == 0


def test_a_missing_set_is_made_of_the_dataset_that_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataConfigError, match=r"does not exist; .*shards\.writer --dataset pacs "):
        open_shards(DataConfig(dataset="pacs", root=str(tmp_path / "gone")))
    make_folder(tmp_path / "images")
    with pytest.raises(DataConfigError, match=r"but other folders.* --dataset pacs --root .*/im"):
        open_shards(DataConfig(dataset="pacs", root=str(tmp_path / "images")))
    assert main(["--out", str(tmp_path / "gone"), "--dataset", "vlcs", "--verify"]) == 2
    assert "shards.writer --dataset vlcs " in caplog.text


def altered(index: ShardIndex, folder: Path, consistent: bool, **changes: Any) -> Path:
    """A copy of a set whose index says something else; `consistent`: as if written that way."""
    folder.mkdir()
    for path in index.root.iterdir():
        (folder / path.name).hardlink_to(path)
    content = {**json.loads((index.root / "index.json").read_text()), **changes}
    if consistent:
        content["digests"] = {name: section_digest(content[name]) for name in content["digests"]}
    (folder / "index.json").unlink()
    (folder / "index.json").write_text(json.dumps(content))
    return folder


def test_refuses_other_domains_and_classes(pacs: ShardIndex, tmp_path: Path) -> None:
    content = json.loads((pacs.root / "index.json").read_text())
    domains, classes = content["domains"], content["classes"]
    renamed = [{**domains[0], "name": "art"}, *domains[1:]]
    stray = [{**domains[0], "name": "annotations"}, *domains]
    cases = {
        "renamed domain": ({"domains": renamed}, "has 'art' as domain 0, expected 'art_painting'"),
        "swapped": (
            {"domains": [domains[1], domains[0], *domains[2:]]},
            "has 'cartoon' as domain 0, expected 'art_painting'",
        ),
        "stray domain": ({"domains": stray}, "has 'annotations' as domain 0, expected 'art_paint"),
        "lost domain": ({"domains": domains[:3]}, "has nothing as domain 3, expected 'sketch'"),
        "new class": (
            {"classes": [*classes, "class 999"]},
            "has 8 classes, the dataset has 7; .* pacs --root IMAGE_FOLDER --out NEW_SET`",
        ),
        "class order": (
            {"classes": [classes[1], classes[0], *classes[2:]]},
            "has 'class 001' as class 0, expected 'class 000'",
        ),
        "class twice": (
            {"classes": [classes[0], *classes[:6]]},
            "has 'class 000' as class 1, expected 'class 001'",
        ),
    }
    for name, (changes, message) in cases.items():
        root = altered(pacs, tmp_path / name, True, **changes)
        with pytest.raises(DataConfigError, match=message):
            open_shards(DataConfig(dataset="pacs", root=str(root)))
    with pytest.raises(DataConfigError, match=r"--dataset = 'pacs': .* has 'art' as domain 0"):
        check_dataset(ShardIndex.load(tmp_path / "renamed domain"), PACS, "--dataset")


@pytest.mark.parametrize("section", ["classes", "domains", "shards", "dataset"])
def test_an_index_edited_by_hand_is_refused(pacs: ShardIndex, tmp_path: Path, section: str) -> None:
    content = json.loads((pacs.root / "index.json").read_text())
    changed: dict[str, Any] = {
        "classes": [*content["classes"][:-1], "renamed"],
        "domains": [{**content["domains"][0], "name": "art"}, *content["domains"][1:]],
        "shards": content["shards"][::-1],
        "dataset": "vlcs",
    }
    root = altered(pacs, tmp_path / "edited", False, **{section: changed[section]})
    with pytest.raises(DamagedDataError, match=rf"index.json: its '{section}' were changed after"):
        open_shards(DataConfig(dataset="pacs", root=str(root)))
    same = altered(pacs, tmp_path / "same", False)
    assert open_shards(DataConfig(dataset="pacs", root=str(same))).classes == pacs.classes


def test_a_renamed_class_is_found_by_verify(pacs: ShardIndex, tmp_path: Path) -> None:
    """Consistent with itself, so only the shards can tell."""
    classes = [*pacs.classes[:-1], "class 999"]
    root = altered(pacs, tmp_path / "renamed", True, classes=classes)
    problems = verify_shards(ShardIndex.load(root), deep=False).problems
    assert len(problems) == len(PACS.domains or ())
    assert all("its .json does not give class_name 'class 999'" in line for line in problems)
