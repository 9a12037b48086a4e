"""Blocks under torch's compiler: the same numbers, without breaks, each kind compiled once."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import set_checkpoint_early_stop

import moa
from moa.layers.layer import moa_layers
from tests.support.moa_fixtures import (
    METHODS,
    MIXTURES,
    SIDE,
    assert_equal_tensors,
    images,
    position,
    small_config,
    stir,
    tiny_vit,
)


def twins(method: str, **changes: object) -> tuple[nn.Module, nn.Module]:
    """A model as written and its compiled copy, stirred and in training."""
    torch._dynamo.reset()
    counters.clear()
    model = tiny_vit(depth=6)
    moa.inject(model, small_config(method, expert_dropout=0.2, **changes))
    stir(model)
    model.set_grad_checkpointing(True)
    compiled = copy.deepcopy(model.train())
    moa.compile_blocks(compiled, "eager")
    return model, compiled


def train(model: nn.Module, step: int) -> dict[str, Tensor]:
    """Two micro-batches, an update, statistics, and an evaluation that records routes."""
    model.zero_grad()
    found: dict[str, Tensor] = {}
    for first in (0, 2):
        moa.set_routing_position(model, position(first, step))
        with set_checkpoint_early_stop(False):  # so that all of a forward is done again
            loss = model(images(2, seed=first)).square().mean() + moa.aux_loss(model)
        loss.backward()
        found[f"loss {first}"] = loss.detach()
        # A recomputation in backward leaves no graph, which would keep its activations alive.
        assert all(layer.take_routing() is None for _, layer in moa_layers(model))
    for name, layer in moa_layers(model):
        if layer._chosen is not None:
            found[f"chosen {name}"] = layer._chosen
    moa.update_balance(model)
    for name, stats in moa.routing_stats(model).items():
        found |= {f"{key} {name}": value for key, value in stats.items()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"gradient {name}"] = parameter.grad.clone()
            parameter.data.sub_(parameter.grad, alpha=0.01)
    with torch.inference_mode(), moa.recorded_routes(model.eval()) as routes:
        found["scores"] = model(images(3))
    model.train()
    return found | {f"route {name}": gates for name, gates in routes.items()}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_computes_the_same_compiled_once(method: str) -> None:
    """Under accumulation and checkpointing, with choices counted for the balance."""
    mixes = method in MIXTURES
    changes = {"balance": "bias", "shared_rank": 2} if mixes else {}
    model, compiled = twins(method, **changes)
    for step in range(3):
        assert_equal_tensors(train(compiled, step), train(model, step))
        if step == 0:
            graphs = counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    # The first block's input needs no gradient; of the others every second may have an adapter.
    assert 1 <= graphs <= 3
    assert counters["stats"]["unique_graphs"] == graphs, "nothing is compiled later on"
    assert compiled.state_dict().keys() == model.state_dict().keys()
    assert copy.deepcopy(compiled).blocks[0]._compiled_call_impl is None


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(moa.NoMatchingModuleError, match=r"Linear has no `blocks\.N` to compile"):
        moa.compile_blocks(nn.Linear(SIDE, SIDE))
