"""The DeepSpeed engine: a model spread over the ranks, its optimizer, its steps."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero import parameter_offload
from torch import Tensor, nn

import moa
from moa.layers.layer import moa_layers
from trainer.checkpoint.checkpoint import Checkpoint
from trainer.config.optim import OptimConfig
from trainer.engine.collectives import add_up
from trainer.engine.flat import Flat, FlatModel
from trainer.engine.parameter_groups import FACTOR, parameter_groups
from trainer.engine.zero_state import EXPERT_PARALLEL, ZeroState
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
        model: computes scores: the module, or at ZeRO-3 DeepSpeed's engine, which fetches weights.
        device: where it computes.
        dtype: of its weights and inputs.
        never_waits: whether an update is queued on the device without a look at any number of it;
            not at ZeRO-3 or with an offloaded optimizer, which DeepSpeed does in its own way.
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
        groups = parameter_groups(model, self.trainables, config, adapters.ep_size)
        zero = ds_json["zero_optimization"]
        self.flats = self._flatten(groups) if zero["stage"] < 3 else []
        offloads = zero.get("offload_optimizer", {}).get("device", "none") != "none"
        self.never_waits = zero["stage"] < 3 and not offloads
        optimizer = OPTIMIZERS[config.name](
            groups, lr=config.lr, betas=config.betas, eps=config.eps,
            fused=self.never_waits or None,
        )  # fmt: skip
        # Its timer waits for the device at every step, and nobody sees what it measures.
        ds_json = {"timers": {"throughput": {"enabled": False}}, **ds_json}
        if self.never_waits:  # so would this do, for nothing: one bucket holds all
            ds_json["zero_optimization"] = {**zero, "overlap_comm": False}
        seen = FlatModel(self.flats, getattr(model, EXPERT_PARALLEL, None)) if self.flats else model
        self.ds, *_ = deepspeed.initialize(model=seen, optimizer=optimizer, config=ds_json)
        for flat in self.flats:
            flat.share()
        self.model: nn.Module = model if self.flats else self.ds
        self.dtype = next(model.parameters()).dtype
        self._norm, self._clip = torch.zeros((), device=self.device), config.clip
        if self.never_waits:
            _leave_to_optimizer(self.ds.optimizer)

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

    def _flatten(self, groups: Sequence[dict[str, Any]]) -> list[Flat]:
        """Puts one flat tensor into each group, in place of its parameters."""
        names, flats = {p: name for name, p in self.trainables.items()}, []
        for group in groups:
            flats.append(Flat({names[parameter]: parameter for parameter in group["params"]}))
            group["params"] = [flats[-1].parameter]
        return flats

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a micro-batch's loss, averaged over ranks and micro-batches."""
        self.differentiate(loss)
        self.add_gradient()

    def differentiate(self, loss: Tensor) -> None:
        """What of `backward` takes the loss alone, and a CUDA graph can repeat; at ZeRO-3 all."""
        if not self.flats:
            self.ds.backward(loss)
            return
        pieces = self.ds.gradient_accumulation_steps()
        (loss if pieces == 1 else loss / pieces).backward()
        for flat in self.flats:
            flat.take_gradient()

    def add_gradient(self) -> None:
        """What is left of `backward`."""
        if self.flats:
            gradients = [flat.gradient for flat in self.flats]
            self.ds.backward(self.ds(gradients), scale_wrt_gas=False)

    def set_rate(self, lr: float) -> None:
        """The learning rate of the updates from now on, times each group's factor."""
        for group in self.ds.basic_optimizer.param_groups:
            group["lr"] = lr * group[FACTOR]

    def step(self) -> None:
        """Ends a micro-batch; the last one of a step updates, unless its norm is not finite."""
        if self.never_waits and self.ds.is_gradient_accumulation_boundary():
            self._measure()
        self.ds.step()

    def grad_norm(self) -> Tensor:
        """Norm of the global gradient of the last update, before clipping: fp32, on the device."""
        if self.never_waits:
            return self._norm
        return torch.tensor(float(self.ds.get_global_grad_norm() or 0.0), device=self.device)

    def applied(self) -> Tensor:
        """Whether the last update was one: whether its norm is finite; on the device."""
        return self._applied if self.never_waits else self.grad_norm() < torch.inf

    @torch.no_grad()
    def _measure(self) -> None:
        """Tells Adam's kernel what to divide gradients by, and whether to do nothing at all.

        Every number of the gradient is in the share of one rank, experts' too.
        """
        norms = torch.stack(torch._foreach_norm(self._gradients(), dtype=torch.float64))
        self._norm = add_up(norms.dot(norms)).sqrt().float()
        self._applied = self._norm < torch.inf
        adam = self.ds.basic_optimizer
        adam.found_inf = self._applied.logical_not().float()
        if self._clip:
            adam.grad_scale = ((self._norm + 1e-6) / self._clip).clamp(min=1.0)

    def _gradients(self) -> list[Tensor]:
        """This rank's share of the gradient that the next update takes."""
        zero = self.ds.optimizer
        if isinstance(zero, BF16_Optimizer):
            return list(zero.fp32_groups_gradient_flat_partition)
        return [part for parts in zero.averaged_gradients.values() for part in parts]

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


def _leave_to_optimizer(zero: Any) -> None:
    """Has a ZeRO-1 or 2 optimizer hand gradients over as they are.

    What it would do about their norm waits for the device, four times a step.
    """
    if not isinstance(zero, BF16_Optimizer):
        zero.check_grad_overflow = zero.compute_grad_norm = False
        zero.clip_grad = 0.0
        zero._update_model_bit16_weights = lambda _: None  # they are where they were
        zero.scaled_global_norm = lambda: 0.0  # releases before 0.19 ask for it all the same
        return

    @torch.no_grad()
    def step() -> None:
        for master, gradient in zip(
            zero.fp32_groups_flat_partition, zero.fp32_groups_gradient_flat_partition, strict=True
        ):
            master.grad = gradient.to(master.dtype)
        zero.optimizer.step()
        zero.update_lp_params()

    zero.step = step


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
