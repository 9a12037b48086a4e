"""Dropout before the head: what is left grows, and what that is follows from places."""

import pytest
import timm
import torch
from torch import nn

import moa
from moa.layers.dropout import drop_features, dropouts
from moa.model.injection import classifier
from moa.model.static_routing import StaticRouting
from tests.support.moa_fixtures import DIM, images, small_config, tiny_vit

CHANCE = 0.25


def seen_by_heads(model: nn.Module, count: int = 6, first: int = 0, step: int = 2) -> torch.Tensor:
    """What the heads receive of `count` images from the place `first`, [heads, count, DIM]."""
    found: list[torch.Tensor] = []
    head = classifier(model)
    hooks = [
        each.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach()))
        for each in (head if isinstance(head, nn.ModuleList) else [head])
    ]
    moa.set_routing_position(model, moa.RoutingPosition(5, step, first))
    model(images(8)[first : first + count])
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


@pytest.mark.parametrize("method", ["linear", "moa_lora"])
def test_numbers_are_left_out_by_their_place_in_the_global_batch(method: str) -> None:
    model = tiny_vit()
    moa.inject(model, small_config(method))
    whole = seen_by_heads(model.train(), 8)
    drop_features(model.get_classifier(), CHANCE)
    assert [*model.state_dict()] == [*tiny_vit_state(method)]
    left = seen_by_heads(model, 8)
    kept = left != 0
    torch.testing.assert_close(left, torch.where(kept, whole / (1 - CHANCE), 0.0))
    assert kept.float().mean() == pytest.approx(1 - CHANCE, abs=0.1)
    assert (kept != kept[:, :1]).any(dim=-1)[:, 1:].all(), "the same numbers of two images"
    assert torch.equal(torch.cat([seen_by_heads(model, 3), seen_by_heads(model, 5, 3)], 1), left)
    assert not torch.equal(seen_by_heads(model, 8, step=3) != 0, kept)
    static = StaticRouting(model)
    static.place(moa.RoutingPosition(5, 2, 0))
    static.begin(8)
    model(images(8))
    for dropout in dropouts(model):
        features = torch.ones(8, DIM)
        assert torch.equal(dropout(features) != 0, kept[0])
    torch.testing.assert_close(seen_by_heads(model.eval(), 8), whole)


def tiny_vit_state(method: str) -> dict[str, torch.Tensor]:
    model = tiny_vit()
    moa.inject(model, small_config(method))
    return model.state_dict()


def test_without_a_place_torch_draws() -> None:
    model = tiny_vit().train()
    drop_features(model.get_classifier(), 0.5)
    moa.set_routing_position(model, moa.RoutingPosition(5, 2, 0))
    moa.set_routing_position(model, None)
    (dropout,) = dropouts(model)
    torch.manual_seed(0)
    first, second = dropout(torch.ones(4, DIM)), dropout(torch.ones(4, DIM))
    torch.manual_seed(0)
    assert torch.equal(dropout(torch.ones(4, DIM)), first)
    assert not torch.equal(first, second)


def test_each_head_of_a_distilled_model_draws_its_own() -> None:
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, depth=1, embed_dim=DIM,
        num_heads=2, num_classes=3,
    ).train()  # fmt: skip
    drop_features(classifier(model), 0.5)
    moa.set_routing_position(model, moa.RoutingPosition(1, 0, 0))
    first, second = (dropout(torch.ones(4, DIM)) for dropout in dropouts(model))
    assert not torch.equal(first, second)
