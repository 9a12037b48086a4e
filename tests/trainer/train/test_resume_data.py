"""Fault 15: a run does not go on with other data than it began with, and says what differs."""

from pathlib import Path
from typing import Any

import pytest

from shards.config import DataConfig
from shards.read.index import ShardIndex
from shards.read.subset import read_subset
from tests.support.shards_fixtures import make_set, stream_of
from trainer.config.run_config import RunConfig, flat
from trainer.process.errors import ConfigError
from trainer.train.resume import check_agreement


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    domains = ("art", "cartoon", "photo", "sketch")
    return make_set(tmp_path_factory.mktemp("resume"), domains=domains)


def state(index: ShardIndex, **changes: Any) -> dict[str, Any]:
    return {"config": {}, "data": stream_of(index, **changes).fingerprint()}


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("sources", {"sources": [0, 1, 2]}),
        ("batch_per_domain", {"batch_per_domain": 5}),
        ("seed", {"seed": 6}),
        ("trial_seed", {"trial_seed": 0}),
        ("mode", {"mode": "replacement"}),
        ("mode", {"mode": "window", "window": 2}),
        ("holdout_fraction", {"holdout_fraction": 0.21}),
    ],
)
def test_every_setting_of_the_order(
    index: ShardIndex, tmp_path: Path, field: str, changes: dict[str, Any]
) -> None:
    check_agreement(state(index), state(index), tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_agreement(state(index), state(index, **changes), tmp_path)
    assert f"({field})" in str(caught.value)


def test_other_window(index: ShardIndex, tmp_path: Path) -> None:
    old, new = (state(index, mode="window", window=window) for window in (1, 2))
    with pytest.raises(ConfigError, match=r"\(window\): .* has 1, now 2"):
        check_agreement(old, new, tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("order", "other-1"), ("index_sha256", "0" * 64), ("version", 99)]
)
def test_other_data_or_another_order_algorithm(
    index: ShardIndex, tmp_path: Path, field: str, value: object
) -> None:
    old = state(index)
    assert old["data"][field] != value
    old["data"] = {**old["data"], field: value}
    with pytest.raises(ConfigError, match=rf"\({field}\)"):
        check_agreement(old, state(index), tmp_path)


def test_other_list_under_the_same_name(index: ShardIndex, tmp_path: Path) -> None:
    states = []
    for key in ("photo-0000001", "photo-0000002"):  # of a domain that is not trained on
        (tmp_path / "list").write_text(key)
        changed = ShardIndex.load(index.root)
        changed.subset = read_subset(changed, str(tmp_path / "list"), None)
        states.append(state(changed))
    with pytest.raises(ConfigError, match=r"\(subset\)"):
        check_agreement(states[0], states[1], tmp_path)


def test_a_checkpoint_with_the_old_names_of_the_order(index: ShardIndex, tmp_path: Path) -> None:
    old = {"config": {"data.mode": "replacement", "data.window": 0}, "data": {}}
    same, other = (
        {"config": flat(RunConfig(data=DataConfig(order=order))), "data": {}}  # type: ignore[arg-type]
        for order in ("replacement", "permutation")
    )
    assert check_agreement(old, same, tmp_path) == []
    with pytest.raises(ConfigError, match=r"^data.order: .* has 'replacement', now 'permutation'"):
        check_agreement(old, other, tmp_path)


def test_a_changed_order_lets_no_other_arithmetic_through(
    index: ShardIndex, tmp_path: Path
) -> None:
    """The data's entry `order` is the version of the arithmetic, not the setting `data.order`."""
    old, new = state(index), state(index, mode="replacement")
    new["config"] = {"data.order": "replacement"}
    changes = check_agreement(old, new, tmp_path, {"data.order"})
    assert [change["setting"] for change in changes] == ["data.order"]
    new["data"] = {**new["data"], "order": "other-1"}
    with pytest.raises(ConfigError, match=r"\(order\)"):
        check_agreement(old, new, tmp_path, {"data.order"})
