"""How long a step is predicted to take: compute, bytes and latencies, the host, the loaders.

A model, not a measurement: FLOPs, bytes and operations are counted, the rates are assumptions or a
benchmark's. Compute and communication are added up, as if nothing overlapped; a host that launches
operations more slowly than the device is done with them, or loaders that are, set the pace.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from moa.layers.layer import moa_layers
from moa.parallel.placement import resolve_transport, traffic
from trainer.plan.memory import Sharding
from trainer.prepare.batches import Batches
from trainer.prepare.footprint import Footprint

FLOPS = {"bf16": 400e12, "fp32": 40e12}
"""FLOP/s that a GPU is assumed to reach on the backbone, by precision.

About 40 % of the 989 that an H100 could do in bf16, 60 % of the 67 that it could in fp32, where
nothing allows TF32.
"""

LOOP_OPERATIONS = 64
"""Operations of engine, optimizer and loop beside forward and backward."""
GRAPH_OPERATIONS = 8
"""What takes their place with a CUDA graph: its launch, and the copies into and out of buffers."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the hardware is assumed to give."""

    flops: float = FLOPS["bf16"]
    """FLOP/s that a GPU reaches on the backbone"""
    node: float = 200e9
    """bytes/s that a GPU sends within its node"""
    network: float = 25e9
    """bytes/s that a GPU sends to other nodes (200 Gbit/s)"""
    latency: float = 20e-6
    """seconds that a collective takes per doubling of its ranks, however little it sends"""
    gpus_per_node: int = 8
    operation: float = 30e-6
    """seconds in which the host launches an operation (an H200's took 86 ms for 2,825)"""
    loader: float = 100.0
    """images/s of a loader process"""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one step of a process computes and sends."""

    images: int
    flops: float
    """Of one image: forward, backward and recomputation."""
    frozen_bytes: float
    """Weights that ZeRO-3 gathers."""
    trainable: int
    expert_bytes: float
    """What is sent for the experts' sake (`moa.parallel.placement.traffic`)."""
    layers: int
    """Adapted ones."""
    modules: int
    """Blocks whose weights ZeRO-3 gathers one after the other."""
    stage: int
    accumulation: int = 1
    ep_size: int = 1
    transport: Literal["gather", "all_to_all"] | None = None
    """None if the experts are not shared."""
    operations: int = 0
    """Launched by the host in all micro-batches and between them."""
    graphed: bool = False
    """Whether one of them is a CUDA graph of a micro-batch's forward and backward."""
    loaders: int = 0
    """Processes that decode images for one GPU; 0 where that takes no time."""

    def of(self, world: int, global_batch: int) -> "Load":
        """The load if so many GPUs share the global batch."""
        images = global_batch // world
        sent = images / self.images if self.transport == "all_to_all" else 1
        return replace(self, images=images, expert_bytes=sent * self.expert_bytes)


@dataclass(frozen=True)
class Prediction:
    """Seconds of one step by cause."""

    world: int
    images: int
    compute: float
    gradients: float
    weights: float
    experts: float
    host: float = 0.0
    loader: float = 0.0

    @property
    def device(self) -> float:
        """What the GPU needs, if nothing keeps it waiting."""
        return self.compute + self.gradients + self.weights + self.experts

    @property
    def seconds(self) -> float:
        """The whole step."""
        return max(self.device, self.host, self.loader)

    @property
    def bound(self) -> str:
        """What sets the pace: `device`, `host` or `loader`."""
        pace = {"device": self.device, "host": self.host, "loader": self.loader}
        return max(pace, key=lambda name: pace[name])

    @property
    def efficiency(self) -> float:
        """Share of the step in which the GPUs compute."""
        return self.compute / self.seconds


def load_of(
    model: nn.Module,
    footprint: Footprint,
    batches: Batches,
    sharding: Sharding,
    loaders: int,
    graphed: bool = False,
) -> Load:
    """The load of a planned run, whose injected model stands on the meta device.

    Raises `MoAConfigError`: a transport that cannot work.
    """
    layers = [layer for _, layer in moa_layers(model)]
    ep_size, transport, expert_bytes, tokens = 1, None, 0.0, footprint.tokens
    width, pieces = sharding.working_bytes, batches.accumulation
    if layers and layers[0].config.mixes and layers[0].config.ep_size > 1:
        ep_size = layers[0].config.ep_size
        transport = resolve_transport(layers, tokens * batches.micro_batch)
        sent = traffic(layers, tokens * batches.per_process, ep_size, width, pieces)
        expert_bytes = sent[transport]
    parameters = list(model.parameters())
    each = GRAPH_OPERATIONS if graphed else footprint.operations
    return Load(
        images=batches.per_process,
        flops=footprint.forward + footprint.backward + footprint.recomputed,
        frozen_bytes=width * sum(p.numel() for p in parameters if not p.requires_grad),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        expert_bytes=expert_bytes,
        layers=len(layers),
        modules=sum(bool(re.search(r"(^|\.)blocks\.\d+$", n)) for n, _ in model.named_modules()),
        stage=sharding.stage,
        accumulation=pieces,
        ep_size=ep_size,
        transport=transport,
        operations=pieces * each + LOOP_OPERATIONS,
        graphed=graphed,
        loaders=loaders,
    )


def with_passes(load: Load, footprint: Footprint, whole: int, forward: int) -> Load:
    """With so many passes a step, and forwards without a graph; what they send is left out.

    A forward is taken for a third of a pass's operations.
    """
    return replace(
        load,
        flops=whole * load.flops + forward * footprint.forward,
        operations=round(load.operations * (whole + forward / 3)),
    )


def predict(load: Load, world: int, rates: Rates) -> Prediction:
    """One step on `world` GPUs, each with as many images as the load says."""

    def collectives(number: int, sent: float, ranks: int) -> float:
        """Seconds of `number` collectives over `ranks` in which a rank sends `sent` bytes."""
        if ranks == 1:
            return 0.0
        rate = rates.node if ranks <= rates.gpus_per_node else rates.network
        return number * rates.latency * math.log2(ranks) + sent / rate

    pieces, others = load.accumulation, (world - 1) / world
    # Gradients are reduced in fp32 to their owners, from stage 2 on after every micro-batch since
    # nobody else keeps them; the new weights are gathered once. Each fills one bucket.
    buckets = 1 + (pieces if load.stage > 1 else 1)
    gradients = collectives(buckets, buckets * 4 * load.trainable * others, world)
    weights = 0.0
    if load.stage == 3:  # forward and backward of every micro-batch gather each block's weights
        gathers = 2 * pieces
        sent = gathers * load.frozen_bytes * others
        weights = collectives(gathers * load.modules, sent, world)
    # Per layer tokens and gates travel there, updates back; in backward their gradients.
    number = 6 * load.layers if load.transport == "all_to_all" else 2
    experts = collectives(number * pieces, load.expert_bytes, load.ep_size)
    compute = load.flops * load.images / rates.flops
    host = load.operations * rates.operation
    loader = load.images / (load.loaders * rates.loader) if load.loaders else 0.0
    return Prediction(world, load.images, compute, gradients, weights, experts, host, loader)
