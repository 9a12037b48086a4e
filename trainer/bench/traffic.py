"""Bytes that expert parallelism sends per step, counted at the collectives.

Real processes with real collectives run adapted layers of the width asked for, on random tokens;
the attention between them sends nothing and is left out. The bytes of a layer are alike in all
layers, so two stand for the model's.
"""

import multiprocessing
import os
import socket
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.bench.timing import Table
from trainer.process.world import World

LAYERS_RUN = 2


@dataclass(frozen=True)
class Shape:
    """A backbone's adapted layers and the tokens of one GPU."""

    name: str = "ViT-L/14"
    width: int = 1024
    layers: int = 12
    tokens: int = 64 * 257


class _Stack(nn.Module):
    """Adapted layers one after the other, each fed the first third of the one before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(LAYERS_RUN))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.blocks:
            x = layer(x)[..., : x.shape[-1]]
        return x


def measure(shape: Shape = Shape(), ep_sizes: tuple[int, ...] = (2, 4)) -> dict[str, Table]:
    """MiB per step of each transport, and how many times more tokens weigh than experts."""
    rows: Table = {}
    for ep_size in ep_sizes:
        sent = {t: _sent(shape, ep_size, t) for t in ("gather", "all_to_all")}
        rows[f"ep_size {ep_size}"] = {
            **{f"{name} MiB": number / 2**20 for name, number in sent.items()},
            "all_to_all / gather": sent["all_to_all"] / sent["gather"],
        }
    title = (
        f"sent per rank and step, forward and backward: moa_lora in {shape.layers} layers of "
        f"{shape.name}, {shape.tokens} tokens per rank, fp32"
    )
    return {title: rows}


def _sent(shape: Shape, ep_size: int, transport: str) -> float:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(ep_size, mp_context=context) as pool:
        port = free_port()
        runs = [pool.submit(_run, shape, ep_size, transport, rank, port) for rank in range(ep_size)]
        mean = sum(run.result() for run in runs) / ep_size
    return mean / LAYERS_RUN * shape.layers


def _run(shape: Shape, ep_size: int, transport: str, rank: int, port: int) -> int:
    import moa
    from moa.layers.layer import MoALinear
    from moa.parallel.expert_parallel import ExpertParallel
    from trainer.engine import engine

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    engine.start(World(rank, ep_size, rank, ep_size))
    torch.manual_seed(0)
    config = moa.MoAConfig(method="moa_lora", ep_size=ep_size, transport=transport)  # type: ignore[arg-type]
    stack = _Stack(shape.width)
    for number, base in enumerate(stack.blocks):
        stack.blocks[number] = MoALinear(base, config)  # type: ignore[arg-type]
    parallel = ExpertParallel(stack, ep_size, rank, shape.tokens)
    parallel.set_deepspeed_parallelism()
    torch.manual_seed(rank)
    tokens = torch.randn(1, shape.tokens, shape.width, requires_grad=True)
    torch.autograd.backward(stack(tokens).square().mean())
    engine.stop()
    return parallel.bytes_sent


def free_port() -> int:
    """A TCP port of this host that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
