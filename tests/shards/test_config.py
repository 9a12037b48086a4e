import ast
from pathlib import Path

import pytest

import shards
from shards.config import DataConfig
from shards.datasets import dataset_spec
from shards.errors import DataConfigError

PACKAGE = Path(__file__).resolve().parents[2] / "shards"


def test_defaults_are_legal() -> None:
    assert DataConfig().problems() == []
    assert DataConfig(dataset="folder", root="somewhere").problems() == []


def test_all_problems_are_listed_at_once() -> None:
    config = DataConfig(
        dataset="digit",
        order="shuffle",  # type: ignore[arg-type]
        workers=-1,
        holdout_fraction=1.5,
        augment="mirror",  # type: ignore[arg-type]
    )
    assert config.problems() == [
        "data.dataset = 'digit': not a known dataset; legal: digits, folder, pacs, vlcs, "
        "officehome, terraincognita, domainnet (did you mean 'digits'?)",
        "data.order = 'shuffle': must be one of permutation, window, replacement",
        "data.workers = -1: must be 0 or more",
        "data.holdout_fraction = 1.5: must lie in [0, 1); DomainBed uses 0.2",
        "data.augment = 'mirror': must be one of auto, domainbed, no_flip, crop_flip, "
        "randaugment, none",
    ]
    (problem,) = DataConfig(dataset="folder").problems()
    assert problem.startswith("data.root is not set")
    assert "`python -m shards.writer --dataset folder --root IMAGE_FOLDER --out SET`" in problem


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"order": "window"}, "data.order_window = 0: order window needs the number of shards"),
        ({"order_window": 4}, "data.order_window = 4: only for data.order window, not permutation"),
        ({"decode": "cv2"}, "data.decode = 'cv2': must be one of auto, pil"),
        ({"truncated": "drop"}, "data.truncated = 'drop': must be one of keep, substitute"),
        ({"augment_on": "gpu"}, "data.augment_on = 'gpu': must be one of loader, device"),
        ({"augment_on": "device", "decode": "pil"}, "data.augment_on = 'device': works on tensors"),
        ({"mix": "blend"}, "data.mix = 'blend': must be one of none, mixup, cutmix"),
        ({"mix": "mixup", "mix_alpha": 0.0}, "data.mix_alpha = 0.0: must be a finite number > 0"),
        ({"mix_alpha": 0.2}, "data.mix_alpha = 0.2: has no effect without data.mix mixup or cut"),
        ({"max_bad_fraction": 1.5}, "data.max_bad_fraction = 1.5: must lie in [0, 1]"),
        ({"root": "http://x/y"}, "data.cache_dir is not set: data.root = 'http://x/y' needs a"),
        ({"root": "pipe:cat {}"}, "data.cache_dir is not set"),
        ({"cache_gib": 0.0}, "data.cache_gib = 0.0: must be a finite number > 0"),
        ({"fetch_deadline": float("inf")}, "data.fetch_deadline = inf: must be a finite number"),
        ({"fetch_retries": -1}, "data.fetch_retries = -1: must be 0 or more"),
        ({"exclude_list": "a", "include_list": "b"}, "data.include_list = 'b': not together"),
    ],
)
def test_reading_settings_that_cannot_work(change: dict, problem: str) -> None:
    (found,) = DataConfig(**change).problems()
    assert found.startswith(problem)


def test_reading_settings_that_can_work(tmp_path: Path) -> None:
    for change in (
        {"order": "window", "order_window": 4},
        {"order": "replacement"},
        {"root": "s3://bucket/set", "cache_dir": str(tmp_path)},
        {"decode": "pil", "truncated": "substitute", "max_bad_fraction": 0.0},
        {"augment_on": "device"},
        {"augment": "randaugment", "augment_on": "device", "mix": "cutmix", "mix_alpha": 0.2},
    ):
        assert DataConfig(**change).problems() == []  # type: ignore[arg-type]


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


def test_settings_that_only_a_remote_root_uses_are_told() -> None:
    given = {"cache_dir": "c", "cache_gib": 9.0, "fetch_retries": 1}
    for root in (None, "set"):
        config = DataConfig(root=root, **given)
        assert (config.problems(), config.unused()) == ([], list(given))
        assert DataConfig(root=root).unused() == []
    assert DataConfig(root="pipe:cat {}", **given).unused() == []


def test_public_names_exist_and_are_documented() -> None:
    for name in shards.__all__:
        assert getattr(shards, name).__doc__, name
    assert sorted(shards.__all__) == shards.__all__
    with pytest.raises(AttributeError, match="No shards attribute nonsense"):
        shards.nonsense  # noqa: B018


def test_package_imports_nothing_it_must_not() -> None:
    forbidden = ("moa", "trainer", "deepspeed", "torch.distributed", "timm")
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                assert not any(f"{name}.".startswith(f"{bad}.") for bad in forbidden), (path, name)
