"""Expert parallelism: each process of a group owns some experts, and their optimizer state.

Two transports bring experts and tokens together. `gather`: the weights of all layers' experts
travel, in one all-gather per forward and one reduce-scatter of their gradients; the tokens stay.
`all_to_all`: the tokens travel to the experts' owners, and the updates back.
Both give the numbers of one process that owns everything.

Letters: N tokens of a process, D in, O out, E experts of a layer, G processes of a group.

DeepSpeed learns of the experts by the class `ExpertParallel` (a `MoE`) and by two marks on their
parameters; it sums their gradients over the processes that own the same ones and divides by the
whole world, so the backward of both transports sums over the group.
"""

from dataclasses import dataclass
from functools import partial
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
class _Factor:
    """A factor of an expert: where it is, and its shape."""

    layer: int
    expert: int
    name: str
    shape: torch.Size


class ExpertParallel(MoE):  # type: ignore[misc]
    """The owner of some experts of a model, and the transport between them and the tokens.

    Replaces the experts that other processes own by placeholders, and marks the rest for DeepSpeed.
    Call before `deepspeed.initialize`, which builds the process groups.

    Args:
        model: the injected model, alike in all processes.
        ep_size: G; divides the world.
        process: this one's number in the world; a group is G processes in a row.
        tokens: N of a layer in one micro-batch of one process, to choose a transport.

    Attributes:
        transport: `gather` or `all_to_all`.
        owners: per layer the owner of each expert, 0 to G - 1.

    Raises:
        MoAConfigError: nothing to distribute, or a transport that cannot work.
    """

    def __init__(self, model: nn.Module, ep_size: int, process: int, tokens: int) -> None:
        nn.Module.__init__(self)  # not MoE's own, which would build DeepSpeed's experts
        layers = [layer for _, layer in moa_layers(model)]
        if not layers or not layers[0].config.mixes:
            raise MoAConfigError(
                f"moa.ep_size: {ep_size} with a model that has no mixture of experts to "
                "distribute; use multi_lora, moa_lora or moa_kron, or --moa.ep_size 1"
            )
        self.num_experts = len(layers[0].ranks)
        self.ep_size = ep_size
        self.members = ExpertGroup(size=ep_size, ep_rank=process % ep_size)
        self.expert_group_name = f"ep_size_{ep_size}"
        self.transport = resolve_transport(layers, tokens)
        costs = [
            [sum(p.numel() for p in e.parameters()) for e in layer.experts] for layer in layers
        ]
        self.owners = place_experts(costs, ep_size)
        self._layers = tuple(layers)  # a tuple hides them: they are the model's
        self._factors = self._by_owner()
        sizes = [sum(factor.shape.numel() for factor in own) for own in self._factors]
        self._row = max(*sizes, 1)  # with room for the number of an idle one
        self._idle = self.members.idle = self._drop_others()
        self._flat: tuple[Tensor, Any, Tensor] | None = None
        self._gathered: list[list[SimpleNamespace]] | None = None
        if self.transport == "gather":
            model.register_forward_pre_hook(lambda *_: self._start_gather())
        else:
            model.register_forward_pre_hook(self._agree_on_images)
        for number, layer in enumerate(layers):
            if self.transport == "gather":
                layer.remote_experts = partial(self._experts, number)
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

    def _by_owner(self) -> list[list[_Factor]]:
        """Per process the factors that its row holds."""
        found: list[list[_Factor]] = [[] for _ in range(self.ep_size)]
        for number, (layer, owners) in enumerate(zip(self._layers, self.owners, strict=True)):
            for e, (expert, owner) in enumerate(zip(layer.experts, owners, strict=True)):
                named = expert.named_parameters()
                found[owner] += [_Factor(number, e, name, p.shape) for name, p in named]
        return found

    def _drop_others(self) -> nn.Parameter | None:
        """Keeps this process's experts; one without any gets a number that does nothing.

        DeepSpeed wants an expert parameter in every process, and the same number of groups.
        """
        kept: list[nn.Parameter] = []
        for layer, owners in zip(self._layers, self.owners, strict=True):
            for e, owner in enumerate(owners):
                if owner != self.members.ep_rank:
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

    def _agree_on_images(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Batches of training are equal; the last ones of an evaluation may not be."""
        own = most = len(inputs[0])
        if not model.training:
            number = torch.tensor(own, device=inputs[0].device)
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.members.group)
            most = int(number)
        self.members.images = own, most

    # The gather transport.

    def _start_gather(self) -> None:
        """Sends this process's factors; the first layer that needs any waits for the others'."""
        local = self._local()
        rows = local.new_empty(self.ep_size * self._row)
        work = dist.all_gather_into_tensor(
            rows, local.detach(), group=self.members.group, async_op=True
        )
        self._flat, self._gathered = (local, work, rows), None

    def _local(self) -> Tensor:
        """This process's factors in one padded row."""
        parts = [
            getattr(self._layers[f.layer].experts[f.expert], f.name).reshape(-1)
            for f in self._factors[self.members.ep_rank]
        ]
        parts += [] if self._idle is None else [self._idle]
        padding = self._row - sum(part.numel() for part in parts)
        return torch.cat([*parts, self._layers[0].base.weight.new_zeros(padding)])

    def _experts(self, number: int) -> list[SimpleNamespace]:
        """The experts of a layer, with their factors by name."""
        if self._gathered is None:
            assert self._flat is not None, "the model's own forward starts the gathering"
            rows = _Gathered.apply(*self._flat, self.members).view(self.ep_size, -1)
            experts = [[SimpleNamespace() for _ in layer.experts] for layer in self._layers]
            for row, factors in zip(rows, self._factors, strict=True):
                sizes = [factor.shape.numel() for factor in factors]
                pieces = row.split([*sizes, self._row - sum(sizes)])
                for f, piece in zip(factors, pieces[:-1], strict=True):
                    setattr(experts[f.layer][f.expert], f.name, piece.view(f.shape))
            self._flat, self._gathered = None, experts
        return self._gathered[number]


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
        local = torch.empty(ctx.length, device=gradient.device)
        # In fp32, as all gradients: a sum over ranks shall not be rounded at each of them.
        dist.reduce_scatter_tensor(local, gradient.float().contiguous(), group=members.group)
        return local.to(gradient.dtype), None, None, None
