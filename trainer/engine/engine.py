"""The DeepSpeed engine: process group, optimizer, initialisation, collectives, shutdown."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from deepspeed.moe.utils import configure_moe_param_groups
from torch import Tensor, nn

import moa
from trainer.checkpoint.checkpoint import Checkpoint
from trainer.config.run_config import OptimConfig
from trainer.engine import zero_state
from trainer.engine.collectives import device_of
from trainer.engine.partition import partition
from trainer.process.errors import CheckpointError, TrainingInvalidError
from trainer.process.world import World

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}


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
