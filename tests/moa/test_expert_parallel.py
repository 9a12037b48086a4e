"""Placement and byte counts of expert parallelism; what needs processes is in the parity matrix."""

import itertools

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from moa import MoAConfig, MoAConfigError, MoALinear, inject
from moa.layers.layer import AbsentExpert, moa_layers
from moa.parallel.expert_parallel import ExpertParallel
from moa.parallel.placement import place_experts, resolve_transport, traffic
from tests.support.moa_fixtures import small_config, tiny_vit

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
    """Per layer 2 R (D + O) against 2 N K (D + O), of which (G - 1)/G leaves the rank."""
    layers = layers_of(ranks=(1, 2, 3), top_k=2)
    sent = traffic(layers, tokens=100, ep_size=4, width=2)
    assert sent["gather"] == 2 * 2 * 6 * (16 + 48) * 2 * 3 / 4
    assert sent["all_to_all"] == 2 * 2 * 100 * 2 * (16 + 48) * 2 * 3 / 4
    pieces = traffic(layers, tokens=100, ep_size=4, width=2, micro_batches=5)
    assert pieces == {"gather": 5 * sent["gather"], "all_to_all": sent["all_to_all"]}


def test_large_vit_sends_thousandfold_less_by_gather() -> None:
    """ViT-L/14, 64 images a GPU: 1,097 times, as many as tokens per rank number."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("vit_large_patch14_clip_224", num_classes=7)
        inject(model, MoAConfig(method="moa_lora", blocks="all"))
    layers = [layer for _, layer in moa_layers(model)]
    sent = traffic(layers, tokens=64 * 257, ep_size=8, width=2)
    assert sent["all_to_all"] / sent["gather"] == pytest.approx(64 * 257 / 15)
    assert sent["gather"] / 2**20 == pytest.approx(4.92, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "tokens", "transport"),
    [
        ({}, 100, "gather"),
        ({}, 5, "all_to_all"),  # fewer tokens than ranks
        ({"transport": "gather"}, 5, "gather"),
        ({"transport": "all_to_all"}, 100, "all_to_all"),
        ({"expert_dropout": 0.5}, 5, "gather"),
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
