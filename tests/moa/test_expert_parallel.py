"""Placement and byte counts of expert parallelism; what needs processes is in the parity matrix."""

import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moa import MoAConfig, MoAConfigError, MoALinear, inject
from moa.layers.layer import AbsentExpert, moa_layers
from moa.parallel.expert_parallel import ExpertParallel
from moa.parallel.placement import place_experts, resolve_transport, traffic
from tests.support.moa_fixtures import images, small_config, stir, tiny_vit

COSTS = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=5), min_size=1, max_size=5)


def loads(costs: list[list[int]], owners: list[list[int]], ranks: int) -> list[int]:
    total = [0] * ranks
    for layer, owned in zip(costs, owners, strict=True):
        for cost, owner in zip(layer, owned, strict=True):
            total[owner] += cost
    return total


@settings(deadline=None, max_examples=200)
@given(COSTS, st.integers(1, 9))
def test_every_expert_has_an_owner_and_no_rank_is_idle_in_vain(
    costs: list[list[int]], ranks: int
) -> None:
    owners = place_experts(costs, ranks)
    assert [len(o) for o in owners] == [len(c) for c in costs]
    total = loads(costs, owners, ranks)
    number = sum(map(len, costs))
    assert sum(load > 0 for load in total) == min(ranks, number)
    assert max(total) - min(total) <= max(map(max, costs))
    assert place_experts(costs, ranks) == owners


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 3))
def test_placement_is_near_the_best(costs: list[int], ranks: int) -> None:
    """Longest processing time first is within 4/3 of the optimum (Graham, 1969)."""
    best = min(
        max(loads([costs], [list(owners)], ranks))
        for owners in itertools.product(range(ranks), repeat=len(costs))
    )
    found = max(loads([costs], place_experts([costs], ranks), ranks))
    assert found <= (4 / 3) * best


def layers_of(**changes: object) -> list[MoALinear]:
    model = tiny_vit()
    inject(model, small_config("moa_lora", **changes))
    return [layer for _, layer in moa_layers(model)]


def test_traffic_by_the_formula() -> None:
    """Per layer 2 R (D + O), of which (G - 1)/G leaves the rank, against 2 N (D + O) to each."""
    layers = layers_of(ranks=(1, 2, 3), top_k=2)
    sent = traffic(layers, tokens=100, ep_size=4, width=2)
    assert sent["gather"] == 2 * 2 * 6 * (16 + 48) * 2 * 3 / 4
    assert sent["all_to_all"] == 2 * 2 * 100 * (16 + 48) * 2 * 3
    pieces = traffic(layers, tokens=100, ep_size=4, width=2, micro_batches=5)
    assert pieces == {"gather": 5 * sent["gather"], "all_to_all": sent["all_to_all"]}


def test_large_vit_sends_thousandfold_less_by_gather() -> None:
    """ViT-L/14, 64 images a GPU: 8,773 times, as many as the group's tokens per rank number."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_large_patch14_clip_224", num_classes=7)
        inject(model, MoAConfig(method="moa_lora", blocks="all"))
    layers = [layer for _, layer in moa_layers(model)]
    sent = traffic(layers, tokens=64 * 257, ep_size=8, width=2)
    assert sent["all_to_all"] / sent["gather"] == pytest.approx(8 * 64 * 257 / 15)
    assert sent["gather"] / 2**20 == pytest.approx(4.92, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "tokens", "transport"),
    [
        ({}, 100, "gather"),
        ({}, 2, "all_to_all"),  # the group has fewer tokens than ranks
        ({"ep_size": 4}, 2, "gather"),
        ({"transport": "gather"}, 2, "gather"),
        ({"transport": "all_to_all"}, 100, "all_to_all"),
        ({"expert_dropout": 0.5}, 2, "gather"),
    ],
)
def test_transport(changes: dict[str, object], tokens: int, transport: str) -> None:
    assert resolve_transport(layers_of(**changes), tokens) == transport


def test_masks_do_not_travel() -> None:
    with pytest.raises(MoAConfigError, match=r"use --moa\.transport gather"):
        resolve_transport(layers_of(transport="all_to_all", expert_dropout=0.5), 100)


@pytest.mark.parametrize("method", ["lora", "linear"])
def test_nothing_to_distribute(method: str) -> None:
    model = tiny_vit()
    inject(model, small_config(method))
    with pytest.raises(MoAConfigError, match="no mixture of experts to distribute"):
        ExpertParallel(model, 2, 0, 100)


def test_each_rank_keeps_its_experts_under_their_global_names() -> None:
    names: list[set[str]] = []
    whole = tiny_vit()
    inject(whole, small_config("moa_kron"))
    for rank in range(4):
        model = tiny_vit()
        inject(model, small_config("moa_kron"))
        parallel = ExpertParallel(model, 2, rank, 100)
        assert parallel.members.ep_rank == rank % 2
        own = {n: p for n, p in model.named_parameters() if ".experts." in n}
        assert all(p.allreduce is False and p.group_name == "ep_size_2" for p in own.values())
        others = [p for n, p in model.named_parameters() if n not in own]
        assert not any(hasattr(p, "allreduce") for p in others)
        names.append(set(own))
        absent = sum(isinstance(m, AbsentExpert) for m in model.modules())
        assert len(own) == 2 * (6 - absent)
    assert names[0] == names[2]
    assert names[1] == names[3]
    assert not names[0] & names[1]
    assert names[0] | names[1] == {n for n, _ in whole.named_parameters() if ".experts." in n}


def test_a_rank_without_experts_holds_one_number() -> None:
    held = []
    for rank in range(4):
        model = tiny_vit()
        inject(model, small_config("moa_lora", ranks=(1, 2), blocks=(0,)))
        parallel = ExpertParallel(model, 4, rank, 100)
        own = [p for p in model.parameters() if getattr(p, "allreduce", True) is False]
        held.append((len(own), parallel.members.idle is not None))
        assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in own)
    assert sorted(held) == [(1, True), (1, True), (2, False), (2, False)]


@pytest.fixture
def alone() -> Iterator[None]:
    """A group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class HostReads(TorchDispatchMode):
    """Operations whose result the host has to wait for."""

    NAMES = ("aten._local_scalar_dense", "aten.nonzero", "aten.bincount", "aten.is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.found += [str(func)] if str(func).startswith(self.NAMES) else []
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["moa_lora", "moa_kron"])
@pytest.mark.usefixtures("alone")
def test_tokens_travel_without_a_read_and_get_the_same_updates(method: str) -> None:
    plain, sharing = tiny_vit(), tiny_vit()
    for model in (plain, sharing):
        inject(model, small_config(method, top_k=2, gate_noise=0.0, transport="all_to_all"))
        stir(model)
    parallel = ExpertParallel(sharing, 1, 0, 100)
    parallel.members.group = dist.group.WORLD
    for model in (plain, sharing):
        with HostReads() as reads:
            model.train()(images(2)).square().mean().backward()
        assert not reads.found
    shared = dict(sharing.named_parameters())
    for name, p in plain.named_parameters():
        torch.testing.assert_close(shared[name].grad, p.grad, msg=name)
    wanted = plain.eval()(images(2))
    torch.testing.assert_close(sharing.eval()(images(2)), wanted)
    with mock.patch.object(dist, "all_reduce", lambda number, *_, **__: number.add_(1)):
        # Another process evaluates an image more.
        torch.testing.assert_close(sharing(images(2)), wanted)
    assert parallel.members.images == (2, 3)
