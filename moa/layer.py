"""`MoALinear`: a frozen linear layer with adapters beside it, and what a model of them reports.

Letters: B images, T tokens per image, N = B T tokens, D in, O out, E experts, L adapted layers.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moa.config import MoAConfig
from moa.errors import MoAConfigError
from moa.experts import KroneckerExpert, KroneckerRule, LoRAExpert, kronecker_delta, lora_delta
from moa.router import CosineRouter, Routing, balance_counts, balance_loss

SumOverRanks = Callable[[Tensor], Tensor]


@dataclass
class RoutingPosition:
    """Where the running micro-batch stands, so that gate noise does not depend on the world size.

    Attributes:
        seed: the run's seed.
        step: global step; with gradient accumulation its micro-batches share the step.
        first: position of the local micro-batch's first image in the global batch.
        global_batch: images in the global batch.
    """

    seed: int
    step: int
    first: int
    global_batch: int


class MoALinear(nn.Module):
    """y = base(x) + sum_e gate_e(x) delta_e(x) + bias, with `base` frozen.

    `bias` exists only with Kronecker experts. A config without a router (`lora`, `kadaptation`) has
    one expert with a gate of one. A LoRA layer starts exactly equal to its base, a Kronecker layer
    within the tiny update that its initial factors give.

    Args:
        base: the linear layer to wrap; its parameters are frozen here.
        config: an adapter method (`lora`, `kadaptation`, `moa_lora`, `moa_kron`).
        kron_rule: the model's shared rule; a lone Kronecker layer makes its own.

    Raises:
        MoAConfigError: the config is illegal, or `kron_dim` does not divide the layer's widths.
    """

    def __init__(
        self, base: nn.Linear, config: MoAConfig, kron_rule: KroneckerRule | None = None
    ) -> None:
        super().__init__()
        config.check()
        config = config.resolved()
        if not config.adapts or not config.ranks:
            raise MoAConfigError(f"moa.method: {config.method!r} does not wrap layers")
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.config = config
        self.layer_number = 0
        self.position: RoutingPosition | None = None
        self._counts: Tensor | None = None  # [2, E] with graph, until aux_loss takes it
        self._stats: dict[str, Tensor] = {}
        self._shared_rule: tuple[KroneckerRule, ...] = ()  # a tuple hides it from the module tree
        self.bias: nn.Parameter | None = None
        if config.kronecker:
            self._add_kronecker(kron_rule)
        else:
            self.experts = nn.ModuleList(
                LoRAExpert(self.in_features, self.out_features, r, base.weight)
                for r in config.ranks
            )
        self.router: CosineRouter | None = None
        if config.routed:
            self.router = CosineRouter(
                self.in_features, len(config.ranks), config.router_dim, config.top_k, base.weight
            )

    def _add_kronecker(self, kron_rule: KroneckerRule | None) -> None:
        dim, weight = self.config.kron_dim, self.base.weight
        check_kron_dim(self.base, dim, "the layer")
        self.experts = nn.ModuleList(
            KroneckerExpert(self.in_features, self.out_features, r, dim, weight)
            for r in self.config.ranks or ()
        )
        self.bias = nn.Parameter(weight.new_zeros(self.out_features))
        if kron_rule is None:
            self.kron_rule = kron_rule = KroneckerRule(dim, weight)
        self._shared_rule = (kron_rule,)

    def extra_repr(self) -> str:
        """The settings that tell two layers apart."""
        return f"method={self.config.method}, ranks={list(self.config.ranks or ())}"

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, ..., D] to [B, ..., O]; the first axis counts images (for the gate noise)."""
        tokens = x.reshape(-1, self.in_features)
        gates = None
        if self.router is not None:
            routing: Routing = self.router(tokens, self._gate_noise(x))
            gates = routing.gates
            self._record(routing)
        delta = self._delta(tokens, gates).view(*x.shape[:-1], self.out_features)
        y: Tensor = self.base(x) + delta
        return y if self.bias is None else y + self.bias

    def _delta(self, tokens: Tensor, gates: Tensor | None) -> Tensor:
        if self.config.kronecker:
            return kronecker_delta(tokens, list(self.experts), gates, self._shared_rule[0])  # type: ignore[arg-type]
        return lora_delta(tokens, list(self.experts), gates)  # type: ignore[arg-type]

    def _gate_noise(self, x: Tensor) -> Tensor | None:
        """Noise [N, E] that each token of the global batch gets whoever computes it.

        It is drawn for the whole global batch from (seed, step, layer) and sliced: a rank's share,
        and a recomputation under activation checkpointing, see the same numbers.
        """
        scale = self.config.gate_noise / len(self.experts)
        if not self.training or scale == 0:
            return None
        images, width = x.shape[0], x.shape[1:-1].numel() * len(self.experts)
        position = self.position
        if position is None:  # used alone, outside a trainer: torch's own random numbers
            noise = torch.randn(images, width, device=x.device)
        else:
            key = f"gate noise/{position.seed}/{position.step}/{self.layer_number}".encode()
            digest = hashlib.blake2b(key, digest_size=8).digest()
            generator = torch.Generator(x.device).manual_seed(int.from_bytes(digest, "big") >> 1)
            rows = max(position.global_batch, position.first + images)
            noise = torch.randn(rows, width, device=x.device, generator=generator)
            noise = noise[position.first : position.first + images]
        return scale * noise.reshape(-1, len(self.experts))

    def _record(self, routing: Routing) -> None:
        """Keeps the balance counts (with graph) and detached statistics of a training forward."""
        if not self.training:
            return
        counts = balance_counts(routing)  # always: a recomputation must repeat every operation
        if torch._C._current_graph_task_id() != -1:
            return  # activation checkpointing recomputes in backward: aux_loss had its counts
        self._counts = counts
        with torch.no_grad():
            probs = routing.probs
            self._stats = {
                "load": (routing.gates > 0).float().mean(0),
                "entropy": torch.special.entr(probs).sum(-1).mean(),
                "max_prob": probs.amax(-1).mean(),
            }

    def take_counts(self) -> Tensor | None:
        """Balance counts [2, E] of the last training forward, once; None if there are none."""
        counts, self._counts = self._counts, None
        return counts

    def stats(self) -> dict[str, Tensor]:
        """`load` [E], `entropy`, `max_prob`, `temperature` of the last training forward."""
        if self.router is None or not self._stats:
            return {}
        return {**self._stats, "temperature": self.router.temperature.detach()[0]}


def check_kron_dim(base: nn.Linear, kron_dim: int, name: str) -> None:
    """Raises `MoAConfigError` unless `kron_dim` divides both widths of `base`."""
    for width in (base.in_features, base.out_features):
        if width % kron_dim:
            legal = [d for d in range(1, 257) if base.in_features % d == base.out_features % d == 0]
            raise MoAConfigError(
                f"moa.kron_dim: {kron_dim} does not divide the width {width} of {name}; legal up "
                f"to 256: {', '.join(map(str, legal))}"
            )


def moa_layers(model: nn.Module) -> Iterator[tuple[str, MoALinear]]:
    """Every `MoALinear` of a model with its module path, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, MoALinear):
            yield name, module


def set_routing_position(model: nn.Module, position: RoutingPosition | None) -> None:
    """Tells every layer where the next micro-batch stands; None returns to unkeyed noise."""
    for _, layer in moa_layers(model):
        layer.position = position


def aux_loss(model: nn.Module, sum_over_ranks: SumOverRanks | None = None) -> Tensor:
    """Load balancing loss of the last training forward, summed over layers, times aux_weight.

    Args:
        model: a model with `MoALinear` layers.
        sum_over_ranks: differentiable sum over the ranks that share the batch, called once with
            the counts of all layers [L, 2, E]; None on a single process.

    Returns:
        A scalar with graph; zero if no layer routes or nothing ran since the last call.
    """
    weight, counts = 0.0, []
    for _, layer in moa_layers(model):
        taken = layer.take_counts()
        if taken is not None:
            weight = layer.config.aux_weight
            counts.append(taken)
    if not counts:
        return torch.zeros((), device=next(model.parameters()).device)
    stacked = torch.stack(counts)
    if sum_over_ranks is not None:
        stacked = sum_over_ranks(stacked)
    return weight * balance_loss(stacked)


def routing_stats(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Per layer path the statistics of the last training forward, detached and on the device."""
    return {name: stats for name, layer in moa_layers(model) if (stats := layer.stats())}
