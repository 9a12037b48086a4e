"""The DeepSpeed engine: a model spread over the ranks, its optimizer, its steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.utils import configure_moe_param_groups
from deepspeed.runtime.zero import parameter_offload
from torch import nn

import moa
from moa.layers.layer import moa_layers
from trainer.checkpoint.checkpoint import Checkpoint
from trainer.config.run_config import OptimConfig
from trainer.engine.zero_state import ZeroState
from trainer.process.device import device_of
from trainer.process.errors import CheckpointError, TrainingInvalidError
from trainer.process.stopping import Stopped
from trainer.process.world import World

_CACHED = "_PartitionedParameterCoordinator__params_to_release"
OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


class Engine(ZeroState):
    """A model under DeepSpeed ZeRO with the optimizer of `OptimConfig`.

    Args:
        model: the injected model; its trainable parameters are optimised, the rest is frozen.
        ds_json: complete DeepSpeed configuration (`trainer.config.deepspeed_json.resolve`).
        adapters: the configuration that `model` was injected with.
        tokens: tokens of an adapted layer in one micro-batch of this rank, by which expert
            parallelism chooses its transport.

    Attributes:
        device: where the model computes.
        dtype: of its weights and inputs.
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
        _spread(model, ds_json, self.device)
        if adapters.ep_size > 1:
            from moa.parallel.expert_parallel import ExpertParallel

            ExpertParallel(model, adapters.ep_size, world.rank, tokens)
        self.trainables = {n: p for n, p in model.named_parameters() if p.requires_grad}
        named = {"params": list(self.trainables.values()), "name": "trainables"}
        groups: list[dict[str, Any]] = [named]  # DeepSpeed asks for the name
        if adapters.ep_size > 1:  # experts apart: they are summed over other ranks than the rest
            groups = configure_moe_param_groups(groups)
        optimizer = OPTIMIZERS[config.name](
            groups, lr=config.lr, eps=config.eps, weight_decay=config.weight_decay
        )
        self.ds, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_json)
        self.dtype = next(model.parameters()).dtype

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Lets DeepSpeed let go of the model after the block, where all ranks end it alike.

        After an error it would wait for collectives that perhaps never end.
        """
        try:
            yield
        except Stopped:
            self._let_go()
            raise
        self._let_go()

    def _let_go(self) -> None:
        self.ds.destroy()
        # ZeRO-3 keeps modules in a list and in the cache of a method, which outlive its end.
        parameter_offload.FWD_MODULE_STACK.clear()
        method = vars(parameter_offload.PartitionedParameterCoordinator).get(_CACHED)
        for cell in getattr(method, "__closure__", None) or ():  # it is wrapped
            getattr(cell.cell_contents, "cache_clear", int)()

    def grad_norm(self) -> float:
        """Norm of the global gradient of the last update, before clipping."""
        return float(self.ds.get_global_grad_norm() or 0.0)

    @contextmanager
    def checks_gradients(self) -> Iterator[None]:
        """Within the block every trainable parameter must receive a gradient.

        A tensor outside the graph would never train, in silence (a frozen input under reentrant
        checkpointing does this), or hang other ranks.

        Raises `TrainingInvalidError`: names the parameters that received none.
        """
        missing = set(self.trainables)
        hooks = [
            p.register_hook(lambda _, name=name: missing.discard(name))  # type: ignore[no-untyped-call]
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


def _spread(model: nn.Module, ds_json: dict[str, Any], device: torch.device) -> None:
    """Gives every rank the main rank's values, module by module; at ZeRO-3 its part of them.

    Only the main rank holds the whole model, on its CPU; the others hold its outline on the meta
    device, and at no time more than one module's own tensors beside what they are to keep.
    """
    sharded = ds_json["zero_optimization"]["stage"] == 3
    dtype = torch.bfloat16 if ds_json["bf16"]["enabled"] else torch.float32
    for module in model.modules():
        own = nn.Module()
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(tensor.is_meta for tensor in tensors):
            module.to_empty(device="cpu" if sharded else device, recurse=False)
        for name, parameter in module.named_parameters(recurse=False):
            if hasattr(parameter, "ds_id"):
                continue
            parameter.data = parameter.data.to(dtype)  # before it moves
            if sharded:
                own.register_parameter(name, parameter)
            else:
                parameter.data = parameter.data.to(device)
                dist.broadcast(parameter.data, 0)
        if len(own._parameters):
            deepspeed.zero.Init(module=own, config_dict_or_path=ds_json)
        for name, buffer in module.named_buffers(recurse=False):
            value = buffer.to(device)  # in its own dtype, as DeepSpeed leaves it in other stages
            dist.broadcast(value, 0)
            setattr(module, name, value)
    for _, layer in moa_layers(model):
        if sharded and layer.config.kronecker:  # the model's rule, used inside the layer's forward
            for parameter in layer.rule.parameters():
                deepspeed.zero.register_external_parameter(layer, parameter)


def restore_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copies fp32 values into a model, before an engine makes its masters from them.

    Raises `CheckpointError`: names or shapes differ.
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
