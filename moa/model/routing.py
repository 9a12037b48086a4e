"""A model of `MoALinear` layers as a whole: its place in the run, its balance, its statistics.

Letters: E experts, L adapted layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from moa.layers.experts import overlap
from moa.layers.layer import MoALinear, moa_layers
from moa.layers.noise import LayersNoise, RoutingPosition, noise_keys
from moa.layers.router import Routing, TokenRouter, balance_counts, balance_loss

SumOverRanks = Callable[[Tensor], Tensor]


def set_routing_position(model: nn.Module, position: RoutingPosition | None) -> None:
    """Tells every layer where the next micro-batch stands; None returns to unkeyed noise.

    Under activation checkpointing the backward of a forward must come before the next position: the
    recomputation draws the noise of the position that is set when it runs.
    """
    layers = [layer for _, layer in moa_layers(model)]
    if position is None or not layers:
        for layer in layers:
            layer.noise_key = layer.shared_noise = layer.num_images = None
        return
    keys = noise_keys(position, len(layers)).to(layers[0].base.weight.device, non_blocking=True)
    set_noise_keys(layers, keys, position.images)


def set_noise_keys(layers: Sequence[MoALinear], keys: Tensor, images: int | None) -> None:
    """Has the next forward of a model's layers draw by keys [L, KEY_WORDS] on their device."""
    noise = LayersNoise(keys)
    for number, (layer, key) in enumerate(zip(layers, keys.unbind(), strict=True)):
        layer.noise_key, layer.shared_noise = key, partial(noise.normal, number)
        layer.num_images = images


def aux_loss(model: nn.Module, sum_over_ranks: SumOverRanks | None = None) -> Tensor:
    """Load balancing loss of the last training forward, summed over layers, times aux_weight.

    A scalar with graph; zero if no layer routes, `balance` is not by loss, or nothing ran since the
    last call. With `diversity` that times the experts' overlap is added, whatever ran.
    `sum_over_ranks` is the differentiable sum over the processes that share the batch, called once
    with the counts of all layers [L, 2, E]; None on a single process.

    Raises `RuntimeError`: the forward left no graph to routers that train, as under reentrant
    checkpointing; the loss would balance nothing.
    """
    weight, routings, diversity, compared = 0.0, [], 0.0, []
    for name, layer in moa_layers(model):
        if layer.config.diversity and layer.config.mixes:
            diversity = layer.config.diversity
            compared.append(list(layer.experts))
        taken = layer.take_routing()
        if taken is not None and layer.config.balance == "loss":
            weight = layer.config.aux_weight
            _check_graph(name, layer, taken)
            routings.append(taken)
    penalty = diversity * overlap(compared) if compared else None
    if not routings:
        nothing = torch.zeros((), device=next(model.parameters()).device)
        return nothing if penalty is None else penalty
    counts = balance_counts(routings)  # of all layers at once: a GPU waits for small launches
    if sum_over_ranks is not None:
        counts = sum_over_ranks(counts)
    balance = weight * balance_loss(counts)
    return balance if penalty is None else balance + penalty


def _check_graph(name: str, layer: MoALinear, routing: Routing) -> None:
    if routing.logits.requires_grad or not torch.is_grad_enabled() or not layer.config.aux_weight:
        return
    assert layer.router is not None
    if any(p.requires_grad for p in layer.router.parameters()):
        raise RuntimeError(
            f"the training forward left no graph to {name}.router, so the auxiliary loss would "
            "balance nothing: checkpoint with use_reentrant=False; or if the forward ran under "
            "no_grad, take its loss under no_grad, too"
        )


def update_balance(model: nn.Module, sum_over_ranks: SumOverRanks | None = None) -> None:
    """After an optimizer step, moves the choice's bias towards experts with little load.

    Only layers with `balance = bias` have one: each expert's bias goes up by `balance_rate` if
    fewer tokens than the mean chose it, down if more did (Wang et al., "Auxiliary-loss-free load
    balancing strategy for Mixture-of-Experts", arXiv 2408.15664). `sum_over_ranks`, as for
    `aux_loss`, is called once with the token counts of all layers [L, E]; it need not have a graph.
    """
    taken = [(layer, layer.take_chosen()) for _, layer in moa_layers(model)]
    found = [(layer, chosen) for layer, chosen in taken if chosen is not None]
    if not found:
        return
    load = torch.stack([chosen for _, chosen in found])
    if sum_over_ranks is not None:
        load = sum_over_ranks(load)
    steps = (load.mean(-1, keepdim=True) - load).sign().to(torch.int64)
    places = []
    for layer, _ in found:
        assert isinstance(layer.router, TokenRouter)
        assert layer.router.balance_steps is not None
        places.append(layer.router.balance_steps)
    torch._foreach_add_(places, list(steps.unbind()))


def routing_stats(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Per layer path the statistics of the last training forward, detached and on the device."""
    return {name: stats for name, layer in moa_layers(model) if (stats := layer.stats())}


@contextmanager
def recorded_routes(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Within the block, every forward leaves the gates of its tokens in the dictionary given.

    They are [B, ..., E] by layer path, detached and on the device, zero where an expert was not
    chosen. Layers whose gates are the same for all tokens, or that have no router, are not in it.
    """
    routes: dict[str, Tensor] = {}
    before = [(layer, layer.record_gates) for _, layer in moa_layers(model)]
    for name, layer in moa_layers(model):
        layer.record_gates = partial(routes.__setitem__, name)
    try:
        yield routes
    finally:
        for layer, recorder in before:
            layer.record_gates = recorder
