"""Who owns which expert, and which transport sends less: arithmetic, without any process.

Letters: N tokens of a process, E experts of a layer, G processes of a group.
"""

import heapq
from collections.abc import Sequence
from typing import Literal

from moa.errors import MoAConfigError
from moa.layers.layer import MoALinear


def place_experts(costs: Sequence[Sequence[int]], ep_size: int) -> list[list[int]]:
    """Which process of the group owns each expert of each layer.

    The dearest expert left goes to the process with the least so far (longest processing time
    first), over all layers together: processes differ by less than one expert, and none is idle as
    long as there are as many experts as processes.

    Args:
        costs: per layer the cost of each expert, such as its number of parameters.
        ep_size: G.

    Returns:
        Per layer the owner of each expert, 0 to G - 1.
    """
    owners = [[0] * len(layer) for layer in costs]
    items = [(-cost, n, e) for n, layer in enumerate(costs) for e, cost in enumerate(layer)]
    load = [(0, 0, ep_rank) for ep_rank in range(ep_size)]  # cost, number of experts, owner
    for negative, n, e in sorted(items):
        cost, number, ep_rank = heapq.heappop(load)
        owners[n][e] = ep_rank
        heapq.heappush(load, (cost - negative, number + 1, ep_rank))
    return owners


def traffic(
    layers: Sequence[MoALinear], tokens: int, ep_size: int, width: int, micro_batches: int = 1
) -> dict[Literal["gather", "all_to_all"], float]:
    """Bytes that a process sends per step, forward and backward, by transport.

    Args:
        layers: the adapted layers, with all experts.
        tokens: N per layer and step.
        ep_size: G.
        width: bytes of a number.
        micro_batches: of a step; each gathers the experts anew.
    """
    experts = sum(p.numel() for layer in layers for p in layer.experts.parameters())
    sent = sum(tokens * (layer.in_features + layer.out_features) for layer in layers)
    others = 2 * (ep_size - 1) * width
    return {"gather": others * micro_batches * experts / ep_size, "all_to_all": others * sent}


def resolve_transport(layers: Sequence[MoALinear], tokens: int) -> Literal["gather", "all_to_all"]:
    """The transport that the configuration asks for; `auto` is the one that sends fewer bytes.

    Raises `MoAConfigError`: tokens would have to carry a dropout mask.
    """
    config = layers[0].config
    for problem in config.transport_problems():
        raise MoAConfigError(problem)
    if config.transport != "auto":
        return config.transport
    sent = traffic(layers, tokens, max(config.ep_size, 2), 1)
    return "gather" if config.masked or sent["gather"] <= sent["all_to_all"] else "all_to_all"
