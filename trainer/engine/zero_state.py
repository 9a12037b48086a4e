"""What the optimizer holds, by name and whole, whatever stage and world it is spread over.

DeepSpeed keeps fp32 masters and Adam's moments in flat partitions; here they become one fp32 tensor
per trainable name on the CPU of every rank, and go back.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

import moa
from trainer.engine.flat import Flat

MOMENTS = ("exp_avg", "exp_avg_sq")
EXPERT_PARALLEL = "expert_parallel"
"""The model's attribute under expert parallelism (`moa.parallel.expert_parallel.NAME`)."""


class ZeroState:
    """Masters and moments of a module under the engine `ds`; every method is a collective."""

    ds: Any
    module: nn.Module
    trainables: Mapping[str, nn.Parameter]
    """name -> parameter, in the model's order"""
    flats: Sequence[Flat]
    """what DeepSpeed holds of them; empty at ZeRO-3, where it holds each by itself"""

    def masters(self) -> dict[str, Tensor]:
        """fp32 values of all trainables, and as it is what training moves without a gradient."""
        places = moa.adapter_state_dict(self.module)
        moved = {n: t.detach().cpu().clone() for n, t in places.items() if n not in self.trainables}
        return _whole(self.module, moved | self._full(safe_get_full_fp32_param))

    def moments(self) -> dict[str, Tensor]:
        """Adam's moments as `name|exp_avg` and `name|exp_avg_sq`."""
        _link(self.ds.optimizer)
        found = {
            moment: self._full(lambda p, moment=moment: safe_get_full_optimizer_state(p, moment))  # type: ignore[misc]
            for moment in MOMENTS
        }
        local = {f"{n}|{moment}": found[moment][n] for n in self.trainables for moment in MOMENTS}
        return _whole(self.module, local)

    def _full(self, get: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
        """What DeepSpeed gives for what it holds, by name and on the CPU."""
        if not self.flats:
            return {name: _on_cpu(get(p)) for name, p in self.trainables.items()}
        found: dict[str, Tensor] = {}
        for flat in self.flats:
            found |= flat.cut(_on_cpu(get(flat.parameter)))
        return {name: found[name].clone() for name in self.trainables}

    def _units(self) -> Iterator[tuple[nn.Parameter, Callable[[Mapping[str, Tensor]], Tensor]]]:
        """What DeepSpeed holds, and how its whole value comes from those by name."""
        for flat in self.flats:
            if not any(map(_is_idle, flat.named)):  # a rank without experts has a group of its own
                yield flat.parameter, flat.joined
        for name, parameter in self.trainables.items() if not self.flats else ():
            yield parameter, itemgetter(name)

    def write(
        self, masters: Mapping[str, Tensor], moments: Mapping[str, Tensor], step: int
    ) -> None:
        """Gives the optimizer its fp32 masters, moments and step count back.

        The model got its weights before, but an engine in bf16 made its masters from rounded ones.
        """
        fused = self.ds.basic_optimizer.defaults["fused"]  # then steps are counted on the device
        for flat in _flat_masters(self.ds.optimizer):
            # Adam makes its state at its first step; the setters below need it now.
            self.ds.basic_optimizer.state[flat] = {
                "step": torch.tensor(float(step), device=flat.device if fused else "cpu"),
                **{moment: torch.zeros_like(flat) for moment in MOMENTS},
            }
        _link(self.ds.optimizer)
        for parameter, whole in self._units():
            _write_one(parameter, whole(masters), None)
            for moment in MOMENTS:
                ending = f"|{moment}"
                own = {k.removesuffix(ending): t for k, t in moments.items() if k.endswith(ending)}
                _write_one(parameter, whole(own), moment)
        self.ds.global_steps = step

    def adam_steps(self) -> int:
        """Updates that Adam has made since it began."""
        steps = (int(state["step"]) for state in self.ds.basic_optimizer.state.values() if state)
        return next(steps, 0)

    def restart_adam(self) -> None:
        """Lets Adam begin anew: its moments and its count of steps become zero, on all ranks."""
        for state in self.ds.basic_optimizer.state.values():
            for value in state.values():
                value.zero_()

    def flat_masters(self) -> list[Tensor]:
        """This rank's share of the fp32 masters; the optimizer's own memory."""
        return [flat.detach() for flat in _flat_masters(self.ds.optimizer)]

    def whole(self, flats: Sequence[Tensor]) -> dict[str, Tensor]:
        """What `masters` would give if `flat_masters` were `flats`."""
        with self._lent() as masters:
            torch._foreach_copy_(masters, list(flats))
            return self.masters()

    def shares_of(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Whole values in the layout of `flat_masters`; the inverse of `whole`."""
        with self._lent() as masters:
            for parameter, whole in self._units():
                _write_one(parameter, whole(values), None)
            return [flat.clone() for flat in masters]

    @contextmanager
    def _lent(self) -> Iterator[list[Tensor]]:
        """`flat_masters`, to be written to within the block; the optimizer gets its own back."""
        masters = self.flat_masters()
        own = [flat.clone() for flat in masters]
        yield masters
        torch._foreach_copy_(masters, own)

    @contextmanager
    def holding(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Within the block the model has other trainables, whole and alike on all ranks.

        The optimizer does not notice, and the model gets its own back afterwards.
        """
        own = self.masters()
        self._show(values)
        try:
            yield
        finally:
            self._show(own)

    @torch.no_grad()
    def _show(self, values: Mapping[str, Tensor]) -> None:
        """Puts whole values into the model alone."""
        parameters: dict[str, Any] = dict(self.module.named_parameters())
        for name, place in moa.adapter_state_dict(self.module).items():
            if _is_idle(name):
                continue
            parameter = parameters.get(name)
            if parameter is None or not hasattr(parameter, "ds_tensor"):
                place.copy_(values[name])
                continue
            parameter.ds_tensor.copy_(_own_share(parameter, values[name]))
            if parameter.numel() == parameter.ds_numel:  # a small one, which stays gathered
                parameter.copy_(values[name])


def _flat_masters(optimizer: Any) -> list[Tensor]:
    """The flat fp32 tensors that the inner optimizer steps, by DeepSpeed's name for the stage."""
    for name in (
        "single_partition_of_fp32_groups",  # ZeRO-1 and 2
        "fp32_partitioned_groups_flat",  # ZeRO-3
        "fp32_groups_flat_partition",  # ZeRO-1 with fp32 accumulation in bf16
    ):
        flat: list[Tensor] | None = getattr(optimizer, name, None)
        if flat is not None:
            return flat
    raise AssertionError(f"{type(optimizer).__name__} keeps its masters in an unknown place")


def _link(optimizer: Any) -> None:
    """Connects parameters with their optimizer state anew.

    DeepSpeed does it once, after the first group's first step, and so misses the groups of experts
    and state that came to be in another way. ZeRO-3 looks the state up and needs no link.
    """
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _write_one(parameter: nn.Parameter, value: Tensor, moment: str | None) -> None:
    """Sets a master (`moment` None) or a moment from its whole value."""
    if hasattr(parameter, "ds_tensor"):
        # DeepSpeed's own setter of whole values fails at ZeRO-3 where ranks do not divide the size.
        value = _own_share(parameter, value)
        set_master, set_moment = safe_set_local_fp32_param, safe_set_local_optimizer_state
    else:
        value = value.to(parameter.device)
        set_master, set_moment = safe_set_full_fp32_param, safe_set_full_optimizer_state
    if moment is None:
        set_master(parameter, value)
    else:
        set_moment(parameter, value, moment)


def _own_share(parameter: Any, value: Tensor) -> Tensor:
    """This rank's part of a whole value at ZeRO-3, padded as DeepSpeed pads it."""
    size = parameter.ds_tensor.numel()
    padded = torch.zeros(size * dist.get_world_size())
    padded[: value.numel()] = value.reshape(-1)
    own = padded[size * dist.get_rank() : size * (dist.get_rank() + 1)]
    return own.to(parameter.ds_tensor.device)


def _is_idle(name: str) -> bool:
    """Whether this is the one number that a rank without experts holds, which no file knows."""
    return name.startswith(f"{EXPERT_PARALLEL}.")


def _whole(module: nn.Module, local: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the experts that other ranks own, without the placeholder of an idle rank."""
    parallel = getattr(module, EXPERT_PARALLEL, None)
    if parallel is None:
        return local
    own = {n: t for n, t in local.items() if not _is_idle(n)}
    parts: list[dict[str, Tensor]] = [{} for _ in range(parallel.ep_size)]
    experts = {n: t for n, t in own.items() if ".experts." in n}
    dist.all_gather_object(parts, experts, group=parallel.members.group)
    return own | {name: tensor for part in parts for name, tensor in part.items()}


def _on_cpu(value: Tensor | None) -> Tensor:
    assert value is not None, "a trainable parameter has no fp32 state under the engine"
    return value.detach().float().cpu().clone()
