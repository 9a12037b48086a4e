import ast
from pathlib import Path

import pytest

import shards
from shards.config import DataConfig
from shards.datasets import dataset_spec
from shards.errors import DataConfigError

PACKAGE = Path(__file__).resolve().parents[1] / "shards"


def test_defaults_are_legal() -> None:
    assert DataConfig().problems() == []
    assert DataConfig(dataset="folder", root="somewhere").problems() == []


def test_all_problems_are_listed_at_once() -> None:
    config = DataConfig(
        dataset="digit",
        mode="shuffle",  # type: ignore[arg-type]
        workers=-1,
        holdout_fraction=1.5,
        augment="mirror",  # type: ignore[arg-type]
    )
    assert config.problems() == [
        "data.dataset = 'digit': not a known dataset; legal: digits, folder "
        "(did you mean 'digits'?)",
        "data.mode = 'shuffle': must be one of permutation, replacement",
        "data.workers = -1: must be 0 or more",
        "data.holdout_fraction = 1.5: must lie in [0, 1); DomainBed uses 0.2",
        "data.augment = 'mirror': must be one of auto, domainbed, no_flip, none",
    ]
    (problem,) = DataConfig(dataset="folder").problems()
    assert problem.startswith("data.root is not set")


@pytest.mark.parametrize(
    ("dataset", "augment", "resolved"),
    [
        ("digits", "auto", "no_flip"),
        ("folder", "auto", "domainbed"),
        ("digits", "domainbed", "domainbed"),
        ("folder", "none", "none"),
    ],
)
def test_augmentation_follows_the_dataset(dataset: str, augment: str, resolved: str) -> None:
    config = DataConfig(dataset=dataset, augment=augment)  # type: ignore[arg-type]
    assert config.resolved_augment() == resolved


def test_dataset_registry() -> None:
    assert dataset_spec("digits").num_classes == 10
    assert dataset_spec("folder").domains is None
    with pytest.raises(DataConfigError, match="--dataset = 'x': not a known dataset"):
        dataset_spec("x", "--dataset")


def test_public_names_exist_and_are_documented() -> None:
    for name in shards.__all__:
        assert getattr(shards, name).__doc__, name
    assert sorted(shards.__all__) == shards.__all__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        shards.nonsense  # noqa: B018


def test_package_imports_nothing_it_must_not() -> None:
    forbidden = ("moa", "trainer", "deepspeed", "torch.distributed", "timm")
    for path in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                assert not any(f"{name}.".startswith(f"{bad}.") for bad in forbidden), (path, name)
