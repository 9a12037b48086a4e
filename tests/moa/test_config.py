import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

import moa
from moa import MoAConfig, MoAConfigError
from moa.blocks import select_blocks

ROOT = Path(__file__).resolve().parents[2]
ADAPTERS = ("lora", "kadaptation", "moa_lora", "moa_kron")


@pytest.mark.parametrize(
    ("method", "ranks", "targets", "blocks"),
    [
        ("full", (), (), "all"),
        ("linear", (), (), "all"),
        ("lora", (2,), ("attn.qkv", "attn.proj"), "all"),
        ("kadaptation", (1,), ("attn.qkv", "attn.proj"), "all"),
        ("moa_lora", (1, 2, 4, 8), ("attn.qkv",), "every_2"),
        ("moa_kron", (1, 2, 4, 8), ("attn.qkv",), "every_2"),
    ],
)
def test_defaults_of_each_method(
    method: str, ranks: tuple[int, ...], targets: tuple[str, ...], blocks: str
) -> None:
    config = MoAConfig(method=method)  # type: ignore[arg-type]
    assert (config.ranks, config.targets, config.blocks) == (None, None, None)
    whole = config.resolved()
    assert (whole.ranks, whole.targets, whole.blocks) == (ranks, targets, blocks)
    assert whole.resolved() == whole
    assert config.problems() == whole.problems() == []
    config.check()


def test_defaults_follow_a_changed_method_and_spare_given_values() -> None:
    given = dataclasses.replace(MoAConfig(blocks="last_2", top_k=2), method="lora")
    whole = given.resolved()
    assert (whole.ranks, whole.blocks, whole.top_k) == ((2,), "last_2", 2)
    assert whole.targets == ("attn.qkv", "attn.proj")


def test_defaults_of_the_paper() -> None:
    config = MoAConfig().resolved()
    assert (config.method, config.router, config.router_dim) == ("moa_kron", "cosine", 256)
    assert (config.top_k, config.gate_noise, config.aux_weight) == (1, 1.0, 0.01)
    assert config.kron_dim == 64


@pytest.mark.parametrize(
    ("method", "adapts", "kronecker", "routed"),
    [
        ("full", False, False, False),
        ("linear", False, False, False),
        ("bias", False, False, False),
        ("attention", False, False, False),
        ("multi_lora", True, False, False),
        ("lora", True, False, False),
        ("kadaptation", True, True, False),
        ("moa_lora", True, False, True),
        ("moa_kron", True, True, True),
    ],
)
def test_what_a_method_is(method: str, adapts: bool, kronecker: bool, routed: bool) -> None:
    config = MoAConfig(method=method)  # type: ignore[arg-type]
    assert (config.adapts, config.kronecker, config.routed) == (adapts, kronecker, routed)


def test_lists_become_tuples_and_given_values_stay() -> None:
    config = MoAConfig(
        ranks=[3, 1],  # type: ignore[arg-type]
        targets=["mlp.fc1", "attn.*"],  # type: ignore[arg-type]
        blocks=[4, 0],  # type: ignore[arg-type]
    )
    assert config.ranks == (3, 1)
    assert config.targets == ("mlp.fc1", "attn.*")
    assert config.blocks == (4, 0)
    assert config == MoAConfig(ranks=(3, 1), targets=("mlp.fc1", "attn.*"), blocks=(4, 0))
    assert hash(config) == hash(dataclasses.replace(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.top_k = 2  # type: ignore[misc]


ILLEGAL = [
    ({"method": "lroa"}, "moa.method: 'lroa'; legal are full, linear, bias"),
    ({"router": "hash"}, "moa.router: 'hash'; legal are cosine, linear, soft, uniform"),
    ({"method": "multi_lora", "router": "soft"}, "use --moa.method moa_lora with it"),
    ({"router": "soft", "top_k": 2}, "router 'soft', which keeps every expert; leave it at 1"),
    ({"router": "uniform", "top_k": 2}, "moa.top_k: 2 with router 'uniform'"),
    ({"router": "soft", "balance": "bias"}, "moa.balance: 'bias' with router 'soft'"),
    ({"balance": "lose"}, "moa.balance: 'lose'; legal are loss, bias"),
    ({"balance_rate": -1.0}, "moa.balance_rate: -1.0; must be a finite number >= 0"),
    ({"shared_rank": -1}, "moa.shared_rank: -1 with moa_kron; must be >= 0"),
    ({"method": "lora", "shared_rank": 2}, "moa.shared_rank: 2 with lora"),
    ({"kron_impl": "sparse"}, "moa.kron_impl: 'sparse'; legal are factored, dense"),
    ({"method": "moa_lora", "kron_impl": "dense"}, "which has no Kronecker experts"),
    ({"expert_dropout": 1.0}, "moa.expert_dropout: 1.0; must be >= 0 and below 1"),
    ({"method": "bias", "targets": []}, "moa.targets: []; name at least one"),
    ({"method": "attention", "blocks": "some"}, "moa.blocks: 'some'; legal are all"),
    ({"ranks": ()}, "moa.ranks: []; give one or more whole numbers >= 1"),
    ({"ranks": (1, 0)}, "moa.ranks: [1, 0]; give one or more whole numbers >= 1"),
    ({"ranks": (4,)}, "moa.ranks: [4] gives moa_kron one expert"),
    ({"ranks": (4,)}, "use --moa.method kadaptation"),
    ({"method": "moa_lora", "ranks": (4,)}, "use --moa.method lora"),
    ({"method": "lora", "ranks": (1, 2)}, "[1, 2] has 2 experts, lora takes one"),
    ({"method": "lora", "ranks": (1, 2)}, "use --moa.method moa_lora"),
    ({"method": "kadaptation", "ranks": (1, 2)}, "use --moa.method moa_kron"),
    ({"top_k": 0}, "moa.top_k: 0; legal is 1 to the number of experts, 4"),
    ({"top_k": 5}, "moa.top_k: 5; legal is 1 to the number of experts, 4"),
    ({"router_dim": 0}, "moa.router_dim: 0; must be >= 1"),
    ({"kron_dim": -8}, "moa.kron_dim: -8; must be >= 1"),
    ({"gate_noise": -0.1}, "moa.gate_noise: -0.1; must be a finite number >= 0"),
    ({"gate_noise": float("nan")}, "moa.gate_noise: nan; must be a finite number >= 0"),
    ({"aux_weight": float("inf")}, "moa.aux_weight: inf; must be a finite number >= 0"),
    ({"diversity": -0.1}, "moa.diversity: -0.1; must be a finite number >= 0"),
    ({"diversity": 0.1, "ep_size": 2}, "with moa.ep_size 2, of whose experts no process holds all"),
    ({"targets": []}, "moa.targets: []; name at least one linear layer"),
    ({"blocks": "every_0"}, "moa.blocks: 'every_0'; legal are all, every_K, last_K"),
    ({"blocks": "first_2"}, "moa.blocks: 'first_2'; legal are"),
    ({"blocks": "all_2"}, "moa.blocks: 'all_2'; legal are"),
    ({"blocks": "last_"}, "moa.blocks: 'last_'; legal are"),
    ({"blocks": "every_2x"}, "moa.blocks: 'every_2x'; legal are"),
    ({"method": "linear", "ranks": (0,)}, "moa.ranks: [0]; give one or more whole numbers >= 1"),
    ({"method": "full", "blocks": "no"}, "moa.blocks: 'no'; legal are"),
    ({"method": "lora", "top_k": 0}, "moa.top_k: 0; must be >= 1"),
    ({"method": "bias", "expert_dropout": 9.0}, "moa.expert_dropout: 9.0; must be"),
    ({"ep_size": 2, "transport": "all_to_all", "expert_dropout": 0.1}, "moa.transport: 'all_to"),
    ({"ranks": (1, 2.5)}, "moa.ranks: (1, 2.5); give a list of whole numbers >= 1"),
    ({"ranks": (1, True)}, "moa.ranks: (1, True); give a list of whole numbers >= 1"),
    ({"targets": "attn.qkv"}, "moa.targets: 'attn.qkv'; give a list of module paths"),
    ({"blocks": (0.5,)}, "moa.blocks: (0.5,); give a list of block numbers"),
    ({"top_k": 1.5}, "moa.top_k: 1.5; must be a whole number"),
    ({"gate_noise": "1"}, "moa.gate_noise: '1'; must be a number"),
    ({"aux_weight": None}, "moa.aux_weight: None; must be a number"),
    ({"expert_dropout": True}, "moa.expert_dropout: True; must be a number"),
    ({"kron_dim": 8.0}, "moa.kron_dim: 8.0; must be a whole number"),
]


@pytest.mark.parametrize(("changes", "message"), ILLEGAL)
def test_each_problem_is_reported(changes: dict[str, object], message: str) -> None:
    config = MoAConfig(**changes)  # type: ignore[arg-type]
    problems = config.problems()
    assert any(message in problem for problem in problems), problems
    assert all("\n" not in problem for problem in problems)
    with pytest.raises(MoAConfigError) as caught:
        config.check()
    assert str(caught.value) == "\n".join(problems)


def test_all_problems_are_reported_at_once() -> None:
    config = MoAConfig(
        router="hash",  # type: ignore[arg-type]
        ranks=(2, 0),
        top_k=3,
        router_dim=0,
        kron_dim=0,
        gate_noise=-1.0,
        aux_weight=float("nan"),
        targets=(),
        blocks="some",
    )
    names = [problem.partition(":")[0].removeprefix("moa.") for problem in config.problems()]
    assert names == [
        "router", "targets", "blocks", "ranks", "kron_dim", "router_dim", "gate_noise",
        "aux_weight", "top_k",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"top_k": 4},
        {"gate_noise": 0.0, "aux_weight": 0.0},
        {"ranks": (1, 1), "router_dim": 1, "kron_dim": 1},
        {"method": "lora", "top_k": 9},  # not used without a router
        {"method": "linear", "ranks": (3,), "blocks": "last_99"},  # adapts nothing
        {"transport": "all_to_all", "expert_dropout": 0.1},  # nothing travels
        {"blocks": "every_12"},
        {"blocks": (3, 1)},
    ],
)
def test_legal_edges(changes: dict[str, object]) -> None:
    assert MoAConfig(**changes).problems() == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("blocks", "depth", "selected"),
    [
        ("all", 3, [0, 1, 2]),
        ("every_1", 3, [0, 1, 2]),
        ("every_2", 12, [0, 2, 4, 6, 8, 10]),
        ("every_3", 8, [0, 3, 6]),
        ("every_9", 4, [0]),
        ("last_1", 4, [3]),
        ("last_4", 4, [0, 1, 2, 3]),
        ("last_3", 12, [9, 10, 11]),
        ((2, 0, 2), 3, [0, 2]),
    ],
)
def test_select_blocks(blocks: str | tuple[int, ...], depth: int, selected: list[int]) -> None:
    assert select_blocks(blocks, depth) == selected


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("last_5", "only 4 blocks"),
        ((0, 4), r"\[0, 4\]; the model has blocks 0 to 3"),
        ((-1,), r"\[-1\]; the model has blocks 0 to 3"),
        ((), "list one or more"),
        ("half", "legal are all, every_K, last_K"),
    ],
)
def test_blocks_that_do_not_exist(blocks: str | tuple[int, ...], message: str) -> None:
    with pytest.raises(MoAConfigError, match=message):
        select_blocks(blocks, 4)


def test_public_names_resolve() -> None:
    assert sorted(moa.__all__) == moa.__all__
    for name in moa.__all__:
        assert getattr(moa, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        moa.nothing  # noqa: B018


def test_configuration_imports_no_torch() -> None:
    code = (
        "import sys, moa.config; moa.config.MoAConfig().check(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"method": "moa_kron", "top_k": 2, "ranks": (1, 3), "kron_dim": 8}, []),
        ({"method": "moa_lora", "kron_dim": 8}, ["kron_dim"]),
        ({"method": "lora", "ranks": (3,), "router": "linear"}, ["router"]),
        ({"method": "multi_lora", "router": "uniform"}, []),
        ({"method": "bias", "ranks": (1,), "blocks": "all"}, ["ranks"]),
        ({"method": "linear", "targets": ("attn.qkv",)}, ["targets"]),
        ({"method": "full", "aux_weight": 0.5}, ["aux_weight"]),
        ({"method": "lora", "diversity": 0.5}, ["diversity"]),
    ],
)
def test_settings_without_effect_are_told(changes: dict[str, object], names: list[str]) -> None:
    config = MoAConfig(**changes)  # type: ignore[arg-type]
    assert config.problems() == []
    assert config.unused() == config.resolved().unused() == names
