"""How a step's time is predicted to grow with the number of GPUs: compute, bytes and latencies.

A model, not a measurement: FLOPs and bytes are counted, the rates are assumptions that a user can
replace by those of a cluster. Compute and communication are added up, as if nothing overlapped.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

    from trainer.footprint import Footprint

WORLDS = (8, 16, 32, 64, 128, 256, 512)
"""GPUs for which a plan predicts a step."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the hardware is assumed to give."""

    flops: float = 400e12
    """FLOP/s that a GPU reaches on the backbone (about 40 % of an H100's bf16 peak)"""
    node: float = 200e9
    """bytes/s that a GPU sends within its node"""
    network: float = 25e9
    """bytes/s that a GPU sends to other nodes (200 Gbit/s)"""
    latency: float = 20e-6
    """seconds that a collective takes per doubling of its ranks, however little it sends"""
    gpus_per_node: int = 8


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one step of a run computes and sends.

    Attributes:
        flops: of one image, forward, backward and recomputation.
        frozen_bytes: weights that ZeRO-3 gathers.
        trainable: numbers that train.
        expert_bytes: of all experts of all layers, in the precision they travel in.
        token_bytes: one image's tokens on their way to experts, both ways, forward only.
        layers: adapted layers.
        modules: blocks whose weights ZeRO-3 gathers one after the other.
        stage: ZeRO stage.
        transport: of expert parallelism.
    """

    flops: float
    frozen_bytes: float
    trainable: int
    expert_bytes: float
    token_bytes: float
    layers: int
    modules: int
    stage: int
    transport: Literal["gather", "all_to_all"] = "gather"


@dataclass(frozen=True)
class Prediction:
    """Seconds of one step by cause."""

    world: int
    images: int
    compute: float
    gradients: float
    weights: float
    experts: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return self.compute + self.gradients + self.weights + self.experts

    @property
    def efficiency(self) -> float:
        """Share of the step in which the GPUs compute."""
        return self.compute / self.seconds


def load_of(
    model: "nn.Module", footprint: "Footprint", stage: int, tokens: int, width: int
) -> Load:
    """The load of a planned run.

    Args:
        model: injected, on the meta device.
        footprint: what was measured of it.
        stage: ZeRO stage.
        tokens: of an adapted layer, per image.
        width: bytes of a weight.
    """
    from moa.layer import moa_layers
    from moa.placement import resolve_transport

    layers = [layer for _, layer in moa_layers(model)]
    mixes = bool(layers) and layers[0].config.mixes
    experts = sum(p.numel() for layer in layers for p in layer.experts.parameters())
    sides = sum(
        layer.config.experts_kept * (layer.in_features + layer.out_features) for layer in layers
    )
    parameters = list(model.parameters())
    return Load(
        flops=footprint.forward + footprint.backward + footprint.recomputed,
        frozen_bytes=width * sum(p.numel() for p in parameters if not p.requires_grad),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        expert_bytes=width * experts,
        token_bytes=width * tokens * sides,
        layers=len(layers),
        modules=len(model.blocks),  # type: ignore[arg-type]
        stage=stage,
        transport=resolve_transport(layers, tokens * footprint.images) if mixes else "gather",
    )


def predict(load: Load, world: int, images: int, ep_size: int, rates: Rates) -> Prediction:
    """One step on `world` GPUs.

    Args:
        load: the run.
        world: GPUs.
        images: per GPU.
        ep_size: ranks that share the experts; 1 for none.
        rates: the hardware.
    """

    def collectives(number: int, sent: float, ranks: int) -> float:
        """Seconds of `number` collectives over `ranks` in which a rank sends `sent` bytes."""
        if ranks == 1:
            return 0.0
        rate = rates.node if ranks <= rates.gpus_per_node else rates.network
        return number * rates.latency * math.log2(ranks) + sent * (ranks - 1) / ranks / rate

    # Gradients are reduced in fp32 to their owners, and the new weights gathered, in one bucket.
    gradients = collectives(2, 2 * 4 * load.trainable, world)
    weights = 0.0
    if load.stage == 3:  # forward and backward gather each block's weights
        weights = collectives(2 * load.modules, 2 * load.frozen_bytes, world)
    if load.transport == "gather":
        experts = collectives(2, 2 * load.expert_bytes, ep_size)
    else:  # sizes, tokens there, results back; in backward the two once more
        experts = collectives(5 * load.layers, 2 * load.token_bytes * images, ep_size)
    return Prediction(world, images, load.flops * images / rates.flops, gradients, weights, experts)
