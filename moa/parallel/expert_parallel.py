"""Expert parallelism: each rank of a group owns some of the experts, and their optimizer state.

Two transports bring experts and tokens together. `gather`: the weights of all layers' experts
travel, in one all-gather per forward and one reduce-scatter of their gradients; the tokens stay.
`all_to_all`: the tokens travel to their experts' owners and back, as in GShard (arXiv 2006.16668).
Both give the numbers of one process that owns everything.

Letters: N tokens of a rank, D in, O out, E experts of a layer, G ranks of a group.

DeepSpeed learns of the experts by the class `ExpertParallel` (a `MoE`) and by two marks on their
parameters; it sums their gradients over the ranks that own the same ones and divides by the whole
world, so the backward of both transports sums over the group.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn

from moa.errors import MoAConfigError
from moa.layers.layer import AbsentExpert, moa_layers
from moa.parallel.exchange import ExpertGroup, TokenExchange, hold_rule
from moa.parallel.placement import place_experts, resolve_transport

NAME = "expert_parallel"
"""The model's attribute that holds its `ExpertParallel`."""


@dataclass(frozen=True)
class _Slot:
    """One factor of one expert within its owner's flat buffer."""

    layer: int
    expert: int
    factor: str
    shape: torch.Size
    start: int


class ExpertParallel(MoE):  # type: ignore[misc]
    """The owner of some experts of a model, and the transport between them and the tokens.

    Replaces the experts that other ranks own by placeholders, and marks the rest for DeepSpeed.
    Call before `deepspeed.initialize`, which builds the process groups.

    Args:
        model: the injected model, alike on all ranks.
        ep_size: G; divides the world.
        rank: this process in the world; a group is G ranks in a row.
        tokens: N of a layer in one micro-batch of one rank, to choose a transport.

    Attributes:
        transport: `gather` or `all_to_all`.
        owners: per layer the owner of each expert.
        members: the ranks of the group.

    Raises:
        MoAConfigError: nothing to distribute, or a transport that cannot work.
    """

    def __init__(self, model: nn.Module, ep_size: int, rank: int, tokens: int) -> None:
        nn.Module.__init__(self)  # not MoE's own, which would build DeepSpeed's experts
        layers = [layer for _, layer in moa_layers(model)]
        if not layers or not layers[0].config.mixes:
            raise MoAConfigError(
                f"moa.ep_size: {ep_size} with a model that has no mixture of experts to "
                "distribute; use multi_lora, moa_lora or moa_kron, or --moa.ep_size 1"
            )
        self.num_experts = len(layers[0].ranks)
        self.ep_size = ep_size
        self.members = ExpertGroup(size=ep_size, rank=rank % ep_size)
        self.expert_group_name = f"ep_size_{ep_size}"
        self.transport = resolve_transport(layers, tokens)
        costs = [
            [sum(p.numel() for p in e.parameters()) for e in layer.experts] for layer in layers
        ]
        self.owners = place_experts(costs, ep_size)
        self._layers = tuple(layers)  # a tuple hides them: they are the model's
        self._slots, self._sizes = self._lay_out()
        self._idle = self.members.idle = self._drop_others()
        self._flat: tuple[Tensor, Any, Tensor] | None = None
        self._gathered: list[list[SimpleNamespace]] | None = None
        if self.transport == "gather":
            model.register_forward_pre_hook(lambda *_: self._start_gather())
        for number, layer in enumerate(layers):
            if self.transport == "gather":
                layer.remote_experts = self._experts_of(number)
            else:
                layer.exchange = TokenExchange(self.members, layer, self.owners[number])
                layer.hold_rule = hold_rule
        setattr(model, NAME, self)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by the engine once torch.distributed runs: builds or finds the groups."""
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )
        self.members.group = groups._get_expert_parallel_group(self.expert_group_name)

    def _lay_out(self) -> tuple[list[list[_Slot]], list[int]]:
        """Per rank the slots of its factors, and the length of its flat buffer."""
        slots: list[list[_Slot]] = [[] for _ in range(self.ep_size)]
        sizes = [0] * self.ep_size
        for number, layer in enumerate(self._layers):
            for e, expert in enumerate(layer.experts):
                owner = self.owners[number][e]
                for name, factor in expert.named_parameters():
                    slots[owner].append(_Slot(number, e, name, factor.shape, sizes[owner]))
                    sizes[owner] += factor.numel()
        return slots, sizes

    def _drop_others(self) -> nn.Parameter | None:
        """Keeps this rank's experts; a rank without any gets one number that does nothing.

        DeepSpeed wants an expert parameter on every rank, and the same number of groups.
        """
        kept: list[nn.Parameter] = []
        for layer, owners in zip(self._layers, self.owners, strict=True):
            for e, owner in enumerate(owners):
                if owner != self.members.rank:
                    layer.experts[e] = AbsentExpert()
                kept += layer.experts[e].parameters()
        idle = None
        if not kept:
            idle = nn.Parameter(self._layers[0].base.weight.new_zeros(1))
            kept.append(idle)
        for parameter in kept:
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = self.expert_group_name  # type: ignore[attr-defined]
        return idle

    # The gather transport.

    def _local(self) -> Tensor:
        """This rank's factors in one padded row."""
        like = self._layers[0].base.weight
        parts = [
            getattr(self._layers[s.layer].experts[s.expert], s.factor).reshape(-1)
            for s in self._slots[self.members.rank]
        ]
        length = sum(part.numel() for part in parts)
        if self._idle is not None:
            parts.append(self._idle)
            length += 1
        padding = self._row() - length
        return torch.cat([*parts, like.new_zeros(padding)])

    def _row(self) -> int:
        """Length of a row: the longest rank's, with room for the number of an idle one."""
        return max(*self._sizes, 1)

    def _start_gather(self) -> None:
        """Sends this rank's factors; the first layer that needs any waits for the others'."""
        local = self._local()
        rows = local.new_empty(self.ep_size * self._row())
        work = dist.all_gather_into_tensor(
            rows, local.detach(), group=self.members.group, async_op=True
        )
        self._flat, self._gathered = (local, work, rows), None

    def _experts_of(self, number: int) -> Callable[[], list[SimpleNamespace]]:
        return lambda: self._finish_gather()[number]

    def _finish_gather(self) -> list[list[SimpleNamespace]]:
        """Per layer and expert its factors, by name."""
        if self._gathered is None:
            assert self._flat is not None, "the model's own forward starts the gathering"
            rows = _Gathered.apply(*self._flat, self.members).view(self.ep_size, -1)
            experts = [[SimpleNamespace() for _ in layer.experts] for layer in self._layers]
            for row, slots in zip(rows, self._slots, strict=True):
                for s in slots:
                    flat = row[s.start : s.start + math.prod(s.shape)]
                    setattr(experts[s.layer][s.expert], s.factor, flat.view(s.shape))
            self._flat, self._gathered = None, experts
        return self._gathered


class _Gathered(torch.autograd.Function):
    """Waits for an all-gather that has begun; backward sums the gradients at the owners."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, work: Any, rows: Tensor, members: ExpertGroup) -> Tensor:
        work.wait()
        ctx.members, ctx.length = members, local.numel()
        return rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        members: ExpertGroup = ctx.members
        local = gradient.new_empty(ctx.length)
        dist.reduce_scatter_tensor(local, gradient.contiguous(), group=members.group)
        return local, None, None, None
