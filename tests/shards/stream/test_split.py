import hashlib

import numpy as np
import pytest

from shards.errors import DataConfigError
from shards.stream.split import split_groups, split_indices, split_seed

DOMAINNET = (48129, 51605, 72266, 172500, 172947, 69128)


def out_sha(out: np.ndarray) -> str:
    return hashlib.sha256(",".join(map(str, out.tolist())).encode()).hexdigest()


@pytest.mark.parametrize(
    ("trial", "env", "seed"),
    [
        (0, 0, 894182419),
        (0, 1, 1514274641),
        (0, 2, 1325548499),
        (0, 3, 1796103049),
        (0, 4, 1773288162),
        (0, 5, 1833038383),
        (1, 0, 785910682),
        (2, 0, 472130416),
    ],
)
def test_seed_equals_domainbed(trial: int, env: int, seed: int) -> None:
    assert split_seed(trial, env) == seed
    assert split_seed(np.int64(trial), np.int64(env)) == seed  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("n", "trial", "env", "first_out", "first_in", "sha"),
    [
        (100, 0, 0, "1 62 30 11 58 46 33 45 47 77", "53 37 34 69 18", "fa3df38895f8"),
        (100, 0, 1, "7 63 70 11 48 99 69 17 62 32", "24 81 57 37 44", "db8610149dd4"),
        (100, 1, 0, "51 66 48 84 7 89 43 63 8 76", "99 26 75 24 79", "87e56ca0793e"),
        (100, 2, 5, "38 1 98 10 20 30 84 44 12 88", "2 17 11 55 47", "f5a2c65204b6"),
        (7, 0, 0, "2", "3 5 1 6 0", "d4735e3a265e"),
        (
            48129,
            0,
            0,
            "12119 15959 34948 14942 8026 28086 4724 10513 11083 39568",
            "38015 25968 44702 32779 5626",
            "5f9b6731ab99",
        ),
    ],
)
def test_split_equals_domainbed(
    n: int, trial: int, env: int, first_out: str, first_in: str, sha: str
) -> None:
    inside, outside = split_indices(n, trial, env)
    assert outside[:10].tolist() == [int(x) for x in first_out.split()]
    assert inside[:5].tolist() == [int(x) for x in first_in.split()]
    assert out_sha(outside)[:12] == sha
    assert inside.dtype == outside.dtype == np.int64


@pytest.mark.parametrize(
    ("env", "size", "sha"),
    [
        (0, 9625, "5f9b6731ab"),
        (1, 10321, "e037c82b2e"),
        (2, 14453, "a304582560"),
        (3, 34500, "83f44d2d05"),
        (4, 34589, "946a7606dc"),
        (5, 13825, "4453061be8"),
    ],
)
def test_domainnet_trial_0(env: int, size: int, sha: str) -> None:
    inside, outside = split_indices(DOMAINNET[env], 0, env)
    assert len(outside) == size
    assert out_sha(outside)[:10] == sha
    assert len(inside) + len(outside) == DOMAINNET[env]


@pytest.mark.parametrize("n", [0, 1, 4, 5, 99])
@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.99])
def test_parts_are_disjoint_and_complete(n: int, fraction: float) -> None:
    inside, outside = split_indices(n, 3, 2, fraction)
    assert sorted([*inside.tolist(), *outside.tolist()]) == list(range(n))
    assert len(outside) == int(n * fraction)


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 2.0, float("nan")])
def test_bad_fraction_is_refused(fraction: float) -> None:
    with pytest.raises(DataConfigError, match=r"holdout_fraction = .* \[0, 1\)"):
        split_indices(10, 0, 0, fraction)
    with pytest.raises(DataConfigError, match="n = -1"):
        split_indices(-1, 0, 0)


@pytest.mark.parametrize(("n", "env"), [(0, 0), (1, 2), (99, 1), (1000, 3)])
def test_groups_of_one_sample_give_the_split_of_samples(n: int, env: int) -> None:
    alone = np.random.default_rng(n).permutation(n).astype(np.uint64)  # names in any order
    groups = [np.zeros(0, np.uint64)] * env + [alone]
    for mine, theirs in zip(split_groups(groups, 7)[env], split_indices(n, 7, env), strict=True):
        assert mine.tolist() == theirs.tolist()


@pytest.mark.parametrize("trial", range(5))
@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.6])
def test_groups_stay_on_one_side_in_all_domains(trial: int, fraction: float) -> None:
    random = np.random.default_rng(trial)
    groups = [random.integers(0, 40, 200) + 25 * env for env in range(3)]  # some are shared
    groups = [(np.uint64(2**63) + group.astype(np.uint64)) for group in groups]
    parts = split_groups(groups, trial, fraction)
    sides: dict[int, set[str]] = {}
    for group, (inside, outside) in zip(groups, parts, strict=True):
        assert sorted([*inside.tolist(), *outside.tolist()]) == list(range(200))
        assert inside.dtype == outside.dtype == np.int64
        for side, places in (("in", inside), ("out", outside)):
            for name in group[places].tolist():
                sides.setdefault(name, set()).add(side)
    assert max(map(len, sides.values())) == 1
    _, sizes = np.unique(groups[0][parts[0][0]], return_counts=True)
    assert abs(len(parts[0][1]) - int(200 * fraction)) <= sizes.min() / 2
    alone = split_groups(groups[:1], trial, fraction)
    assert [part.tolist() for part in alone[0]] == [part.tolist() for part in parts[0]]
    if fraction:
        other = split_groups(groups, trial + 1, fraction)
        assert sorted(other[0][1].tolist()) != sorted(parts[0][1].tolist())


def test_a_single_group_is_trained_on() -> None:
    for fraction in (0.2, 0.9):
        inside, outside = split_groups([np.full(5, 3, np.uint64)], 0, fraction)[0]
        assert (inside.tolist(), outside.tolist()) == ([0, 1, 2, 3, 4], [])
    with pytest.raises(DataConfigError, match=r"holdout_fraction = 1"):
        split_groups([], 0, 1)
