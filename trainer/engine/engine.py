"""The DeepSpeed engine: process group, optimizer, initialisation, collectives, shutdown."""

import gc
import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import configure_moe_param_groups
from deepspeed.runtime import compiler
from torch import Tensor, nn

import moa
from trainer.checkpoint.checkpoint import Checkpoint
from trainer.config.run_config import OptimConfig
from trainer.engine import operators, zero_state
from trainer.engine.partition import partition
from trainer.process.errors import CheckpointError, TrainingInvalidError
from trainer.process.world import World, export_world

T = TypeVar("T")

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


def device_of(world: World) -> torch.device:
    """The device this process computes on."""
    if torch.cuda.is_available():
        return torch.device("cuda", world.local_rank % torch.cuda.device_count())
    return torch.device("cpu")


def start(world: World) -> None:
    """Joins the process group: NCCL on GPUs, gloo on CPUs.

    On CPUs the cores are shared out among the processes of the host, unless OMP_NUM_THREADS says
    otherwise: processes that each take every core only get into each other's way.
    """
    device = device_of(world)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif world.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // world.local_size))
    operators.prepare(device.type == "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # torch 2.14 renamed collectives that DeepSpeed, and we for older releases, call at every step.
    warnings.filterwarnings(
        "ignore", r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
    _import_muon()
    export_world(world)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world.size == 1:  # alone it needs no port, which another program may take first
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def _import_muon() -> None:
    """Imports DeepSpeed's Muon optimizer without compiling its kernels.

    Every ZeRO engine imports it, if only to see that the optimizer is another, and its kernels load
    torch's compiler: more than a second of every process's start.
    """
    real = compiler.compile
    compiler.compile = lambda: lambda kernel: kernel
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    except ImportError:
        pass  # releases before Muon
    finally:
        compiler.compile = real


def stop() -> None:
    """Leaves the process group, after what is left of models has gone.

    A GPU's pinned memory that only the interpreter's end frees can end the process with an abort.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks, without gradient."""
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def sum_numbers(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The sum of each of some numbers over all ranks."""
    total: list[float] = sum_over_ranks(torch.tensor(numbers, device=device)).tolist()
    return total


def differentiable_sum(value: Tensor) -> Tensor:
    """The sum over all ranks; in backward every rank receives the sum of all ranks' gradients.

    A loss f(sum) computed alike on R ranks thus gives each rank R times the gradient of its part,
    which the engine's division by R turns into the gradient of f for the global batch.
    """
    if dist.get_world_size() == 1:
        return value
    result: Tensor = _SumOverRanks.apply(value)
    return result


class _SumOverRanks(torch.autograd.Function):
    """all_reduce(SUM) whose backward is the same sum over the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return sum_over_ranks(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return sum_over_ranks(gradients[0])


def from_main(value: T) -> T:
    """The main rank's `value` (any picklable object), on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class Engine:
    """A model under DeepSpeed ZeRO with the optimizer of `OptimConfig`.

    Args:
        model: the injected model; its trainable parameters are optimised, the rest is frozen.
        config: the optimizer's settings.
        ds_json: complete DeepSpeed configuration (`trainer.config.deepspeed_json.resolve`).
        world: this process.
        adapters: the configuration that `model` was injected with.
        tokens: tokens of an adapted layer in one micro-batch of this rank, by which expert
            parallelism chooses its transport.

    Attributes:
        module: the model, on the device and in the engine's precision.
        device: where it computes.
        dtype: the dtype of weights and inputs.
        trainables: name -> parameter, in the model's order.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        ds_json: dict[str, Any],
        world: World,
        adapters: moa.MoAConfig,
        tokens: int = 1,
    ) -> None:
        self.module, self.device = model, device_of(world)
        if ds_json["zero_optimization"]["stage"] == 3:
            partition(model, ds_json, self.device)
        else:
            model.to(self.device)
        if adapters.ep_size > 1:
            from moa.parallel.expert_parallel import ExpertParallel

            ExpertParallel(model, adapters.ep_size, world.rank, tokens)
        self.trainables = trainables_of(model)
        groups = parameter_groups(self.trainables)
        if adapters.ep_size > 1:  # experts apart: they are summed over other ranks than the rest
            groups = configure_moe_param_groups(groups)
        optimizer = OPTIMIZERS[config.name](
            groups, lr=config.lr, eps=config.eps, weight_decay=config.weight_decay
        )
        self.ds, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_json)
        self.dtype = next(model.parameters()).dtype

    def __call__(self, images: Tensor) -> Tensor:
        """Class scores [B, C] of images [B, 3, H, W]."""
        scores: Tensor = self.ds(images)
        return scores

    def backward(self, loss: Tensor) -> None:
        """Backward of one micro-batch; gradients are averaged over ranks and micro-batches."""
        self.ds.backward(loss)

    def step(self) -> None:
        """Ends a micro-batch; after the last of a step, clips and updates."""
        self.ds.step()

    def grad_norm(self) -> float:
        """Norm of the global gradient of the last update, before clipping."""
        return float(self.ds.get_global_grad_norm() or 0.0)

    def learning_rate(self) -> float:
        """The rate of the last update."""
        return float(self.ds.get_lr()[0])

    @contextmanager
    def checks_gradients(self) -> Iterator[None]:
        """Within the block every trainable parameter must receive a gradient.

        A tensor outside the graph would never train, in silence (a frozen input under reentrant
        checkpointing does this), or hang other ranks.

        Raises:
            TrainingInvalidError: names the parameters that received none.
        """
        missing = set(self.trainables)

        def noter(name: str) -> Callable[[Tensor], None]:
            return lambda _: missing.discard(name)

        hooks = [
            p.register_hook(noter(name))  # type: ignore[no-untyped-call]
            for name, p in self.trainables.items()
        ]
        yield
        for hook in hooks:
            hook.remove()
        if missing:
            raise TrainingInvalidError(
                f"no gradient reached {', '.join(sorted(missing)[:5])} ({len(missing)} of "
                f"{len(self.trainables)} trainable tensors) in the first step; these would never "
                "train"
            )

    def masters(self) -> dict[str, Tensor]:
        """fp32 values of all trainables, on the CPU of every rank; a collective."""
        return zero_state.read_masters(self.module, self.trainables)

    def moments(self) -> dict[str, Tensor]:
        """Adam's moments as `name|exp_avg` and `name|exp_avg_sq`, like `masters`; a collective."""
        return zero_state.read_moments(self.ds, self.trainables)

    def flat_masters(self) -> list[Tensor]:
        """This rank's share of the fp32 masters; the optimizer's own memory."""
        return zero_state.flat_masters(self.ds)

    def whole(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """Like `masters`, of other values in the layout of `flat_masters`; a collective."""
        return zero_state.read_lent(self.ds, self.trainables, flats)

    def shares_of(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Whole values in the layout of `flat_masters`; the inverse of `whole`, a collective."""
        return zero_state.shares_of(self.ds, self.trainables, values)

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the block the model has other trainables, whole and alike on all ranks.

        The optimizer does not notice, and the model gets its own back afterwards; a collective.
        """
        own = self.masters()
        zero_state.show(self.module, values)
        try:
            yield
        finally:
            zero_state.show(self.module, own)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Gives Adam its fp32 masters, moments and step count back."""
        # Adam has not seen the steps that were left out.
        step = int(checkpoint.state["step"]) - int(checkpoint.state.get("skipped_steps", 0))
        zero_state.write(self.ds, self.trainables, checkpoint.masters, checkpoint.moments, step)


def trainables_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def restore_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copies fp32 values into a model, before an engine makes its masters from them.

    Raises:
        CheckpointError: names or shapes differ.
    """
    places = moa.adapter_state_dict(model)
    wanted = {(name, tuple(place.shape)) for name, place in places.items()}
    given = {(name, tuple(t.shape)) for name, t in checkpoint.masters.items()}
    if wanted != given:
        raise CheckpointError(
            f"{checkpoint.folder}: does not fit the model at {sorted(wanted ^ given)[0]}"
        )
    for name, place in places.items():
        place.copy_(checkpoint.masters[name])


def parameter_groups(trainables: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """The optimizer's groups, each with the `name` that DeepSpeed asks for."""
    return [{"params": list(trainables.values()), "name": "trainables"}]
