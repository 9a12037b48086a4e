"""A model of `MoALinear` layers as a whole: its place in the run, its balance, its statistics.

Letters: E experts, L adapted layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from moa.layers.dropout import dropouts
from moa.layers.experts import overlap
from moa.layers.layer import MoALinear, moa_layers
from moa.layers.noise import LayersNoise, RoutingPosition, noise_keys
from moa.layers.router import Routing, TokenRouter, balance_counts, balance_loss

SumOverRanks = Callable[[Tensor], Tensor]


class AdaptedLayers:
    """What of a model a step talks to: L adapted layers, and the dropout before each classifier.

    Finding them takes a walk over all modules (0.4 ms for ViT-L), which a trainer does once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.by_name = dict(moa_layers(model))
        self.layers = [*self.by_name.values()]
        self.dropouts = dropouts(model)
        self._model = model

    @property
    def drawing(self) -> int:
        """How many noise keys a forward needs."""
        return len(self.layers) + len(self.dropouts)

    def set_position(self, position: RoutingPosition | None) -> None:
        """See `set_routing_position`."""
        if position is None:
            for layer in self.layers:
                layer.noise_key = layer.shared_noise = layer.num_images = None
            for dropout in self.dropouts:
                dropout.noise_key = None
        elif self.drawing:
            keys = noise_keys(position, self.drawing)
            self.set_keys(keys.to(self._device, non_blocking=True), position.images)

    def set_keys(self, keys: Tensor, images: int | None) -> None:
        """Has the next forward draw by keys [drawing, KEY_WORDS] on the model's device."""
        noise, each = LayersNoise(keys[: len(self.layers)]), keys.unbind()
        for number, layer in enumerate(self.layers):
            layer.noise_key, layer.shared_noise = each[number], partial(noise.normal, number)
            layer.num_images = images
        for dropout, key in zip(self.dropouts, each[len(self.layers) :], strict=True):
            dropout.noise_key = key

    def aux_loss(self, sum_over_ranks: SumOverRanks | None = None) -> Tensor:
        """See `aux_loss`, the function."""
        weight, routings, diversity, compared = 0.0, [], 0.0, []
        for name, layer in self.by_name.items():
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
            return torch.zeros((), device=self._device) if penalty is None else penalty
        counts = balance_counts(routings)  # of all layers at once: a GPU waits for small launches
        if sum_over_ranks is not None:
            counts = sum_over_ranks(counts)
        balance = weight * balance_loss(counts)
        return balance if penalty is None else balance + penalty

    def update_balance(self, sum_over_ranks: SumOverRanks | None = None) -> None:
        """See `update_balance`, the function."""
        taken = [(layer, layer.take_chosen()) for layer in self.layers]
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

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device


def set_routing_position(model: nn.Module, position: RoutingPosition | None) -> None:
    """Tells every layer where the next micro-batch stands; None returns to unkeyed noise.

    Under activation checkpointing the backward of a forward must come before the next position: the
    recomputation draws the noise of the position that is set when it runs.
    """
    AdaptedLayers(model).set_position(position)


def aux_loss(model: nn.Module, sum_over_ranks: SumOverRanks | None = None) -> Tensor:
    """Load balancing loss of the last training forward, summed over layers, times aux_weight.

    A scalar with graph; zero if no layer routes, `balance` is not by loss, or nothing ran since the
    last call. With `diversity` that times the experts' overlap is added, whatever ran.
    `sum_over_ranks` is the differentiable sum over the processes that share the batch, called once
    with the counts of all layers [L, 2, E]; None on a single process.

    Raises `RuntimeError`: the forward left no graph to routers that train, as under reentrant
    checkpointing; the loss would balance nothing.
    """
    return AdaptedLayers(model).aux_loss(sum_over_ranks)


def update_balance(model: nn.Module, sum_over_ranks: SumOverRanks | None = None) -> None:
    """After an optimizer step, moves the choice's bias towards experts with little load.

    Only layers with `balance = bias` have one: each expert's bias goes up by `balance_rate` if
    fewer tokens than the mean chose it, down if more did (Wang et al., "Auxiliary-loss-free load
    balancing strategy for Mixture-of-Experts", arXiv 2408.15664). `sum_over_ranks`, as for
    `aux_loss`, is called once with the token counts of all layers [L, E]; it need not have a graph.
    """
    AdaptedLayers(model).update_balance(sum_over_ranks)


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
