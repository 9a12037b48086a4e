"""`MoAConfig`: what is adapted and how. Imports nothing heavy, so `--help` stays fast."""

import re
from dataclasses import dataclass, replace
from typing import Literal, get_args

from moa.errors import MoAConfigError

Method = Literal[
    "full",
    "linear",
    "bias",
    "attention",
    "lora",
    "kadaptation",
    "multi_lora",
    "moa_lora",
    "moa_kron",
]
Router = Literal["cosine", "linear", "soft", "uniform"]

ADAPTER_METHODS = ("lora", "kadaptation", "multi_lora", "moa_lora", "moa_kron")
"""Methods that wrap linear layers; the others only choose what is trainable."""

_BLOCKS = re.compile(r"all|(every|last)_([1-9]\d*)")

# Per method: ranks, targets, blocks, router. `lora` is the paper's baseline (r = 2 on qkv and proj
# of all blocks); the mixtures adapt qkv of every second block ("every qkv" in the paper).
_MIXED = ((1, 2, 4, 8), ("attn.qkv",), "every_2")
_DEFAULTS: dict[str, tuple[tuple[int, ...], tuple[str, ...], str, Router | None]] = {
    "bias": ((), ("attn.*", "mlp.*"), "all", None),
    "attention": ((), ("attn.*",), "all", None),
    "lora": ((2,), ("attn.qkv", "attn.proj"), "all", None),
    "kadaptation": ((1,), ("attn.qkv", "attn.proj"), "all", None),
    "multi_lora": (*_MIXED, "uniform"),
    "moa_lora": (*_MIXED, "cosine"),
    "moa_kron": (*_MIXED, "cosine"),
}


@dataclass(frozen=True, kw_only=True)
class MoAConfig:
    """Which layers get which adapters, and how tokens are routed (design: paper section 3)."""

    method: Method = "moa_kron"
    """full (everything trains), linear (the head only), bias and attention (those parts of the
    backbone), lora and kadaptation (one adapter a layer), multi_lora (several, mixed alike for all
    tokens), moa_lora and moa_kron (several adapters of different rank and a router); all but full
    train the head and what they name"""
    ranks: tuple[int, ...] | None = None
    """rank of each expert; default [1, 2, 4, 8] for the mixtures, [2] for lora, [1] for
    kadaptation"""
    router: Router | None = None
    """cosine (of a projected token and the experts' embeddings), linear (in the token), soft
    (cosine, every expert kept) or uniform (one learned mixture per layer, alike for all tokens);
    default cosine, for multi_lora uniform"""
    router_dim: int = 256
    """dimension in which the cosine router compares a token with the experts' embeddings"""
    top_k: int = 1
    """experts kept per token; their softmax weights are not renormalised"""
    gate_noise: float = 1.0
    """standard deviation of the training noise on the router logits, divided by the number of
    experts"""
    shared_rank: int = 0
    """rank of one more expert that every token uses with a weight of one; 0 is none"""
    balance: Literal["loss", "bias"] = "loss"
    """loss (auxiliary loss, as in the paper) or bias (no loss: experts with little load get a bias
    in the choice, not in the weight)"""
    aux_weight: float = 0.01
    """weight of the load balancing loss"""
    balance_rate: float = 0.001
    """step by which balance = bias moves each expert's bias after an optimizer step"""
    kron_dim: int = 64
    """size P of the shared Kronecker rule; divides the widths of every adapted layer"""
    kron_impl: Literal["factored", "dense"] = "factored"
    """factored (fast) or dense (forms every expert's matrix; for the paper's element dropout)"""
    expert_dropout: float = 0.0
    """dropout of the experts in training: on the matrix elements of dense Kronecker experts, as in
    the paper, else on each token's rank columns"""
    ep_size: int = 1
    """ranks that share the experts of a mixture (expert parallelism); divides the number of
    processes, does not change the result"""
    transport: Literal["auto", "gather", "all_to_all"] = "auto"
    """how expert parallelism brings experts and tokens together: gather (weights travel),
    all_to_all (tokens travel) or auto (whichever sends fewer bytes)"""
    targets: tuple[str, ...] | None = None
    """linear layers inside a block, as module paths such as attn.qkv (shell wildcards allowed);
    default [attn.qkv], for lora and kadaptation [attn.qkv, attn.proj], for attention [attn.*], for
    bias [attn.*, mlp.*]"""
    blocks: str | tuple[int, ...] | None = None
    """all, every_K (blocks 0, K, 2K ...), last_K, or a list of block numbers; default every_2 for
    the mixtures, else all"""

    def __post_init__(self) -> None:
        """Turns lists, as YAML and JSON give them, into tuples."""
        for name in ("ranks", "targets", "blocks"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)

    def resolved(self) -> "MoAConfig":
        """The same configuration with the method's defaults where something was left open."""
        ranks, targets, blocks, router = _DEFAULTS.get(self.method, ((), (), "all", None))
        return replace(
            self,
            ranks=ranks if self.ranks is None else self.ranks,
            targets=targets if self.targets is None else self.targets,
            blocks=blocks if self.blocks is None else self.blocks,
            router=router if self.router is None else self.router,
        )

    @property
    def adapts(self) -> bool:
        """Whether the method wraps linear layers."""
        return self.method in ADAPTER_METHODS

    @property
    def unfreezes(self) -> bool:
        """Whether the method trains parts of the backbone itself, picked by targets and blocks."""
        return self.method in ("bias", "attention")

    @property
    def kronecker(self) -> bool:
        """Whether the experts are Kronecker adapters rather than LoRA."""
        return self.method in ("kadaptation", "moa_kron")

    @property
    def mixes(self) -> bool:
        """Whether a layer has several experts, and so a router."""
        return self.method in ("multi_lora", "moa_lora", "moa_kron")

    @property
    def routed(self) -> bool:
        """Whether the experts' weights differ from token to token."""
        return self.mixes and self.resolved().router != "uniform"

    @property
    def experts_kept(self) -> int:
        """Experts with a weight above zero per token."""
        whole = self.resolved()
        return self.top_k if whole.router in ("cosine", "linear") else len(whole.ranks or ())

    def problems(self) -> list[str]:
        """Every range problem of this configuration, one line each, empty if it is legal."""
        found = self._wrong_choices()
        if self.ep_size < 1 or (self.ep_size > 1 and not self.mixes):
            found.append(
                f"moa.ep_size: {self.ep_size} with {self.method}; must be >= 1, and above 1 only "
                "with multi_lora, moa_lora or moa_kron, which have experts to distribute"
            )
        if self.adapts or self.unfreezes:
            found += self._wrong_places()
        if self.adapts:
            found += [*self._wrong_experts(), *self._wrong_routing()]
        return found

    def _wrong_choices(self) -> list[str]:
        legal = {
            "method": get_args(Method),
            "router": (None, *get_args(Router)),
            "balance": ("loss", "bias"),
            "kron_impl": ("factored", "dense"),
            "transport": ("auto", "gather", "all_to_all"),
        }
        return [
            f"moa.{name}: {getattr(self, name)!r}; legal are {', '.join(filter(None, values))}"
            for name, values in legal.items()
            if getattr(self, name) not in values
        ]

    def _wrong_places(self) -> list[str]:
        whole, found = self.resolved(), []
        if not whole.targets:
            found.append("moa.targets: []; name at least one linear layer, such as [attn.qkv]")
        if isinstance(whole.blocks, str) and not _BLOCKS.fullmatch(whole.blocks):
            found.append(
                f"moa.blocks: {self.blocks!r}; legal are all, every_K, last_K (K >= 1), or a list "
                "of block numbers"
            )
        return found

    def _wrong_experts(self) -> list[str]:
        ranks, kind, found = self.resolved().ranks or (), self.method, []
        if not ranks or any(r < 1 for r in ranks):
            found.append(f"moa.ranks: {list(ranks)}; give one or more whole numbers >= 1")
        if self.mixes and len(ranks) == 1:
            found.append(
                f"moa.ranks: {list(ranks)} gives {kind} one expert; give two or more, or "
                f"use --moa.method {'kadaptation' if self.kronecker else 'lora'}"
            )
        if not self.mixes and len(ranks) > 1:
            found.append(
                f"moa.ranks: {list(ranks)} has {len(ranks)} experts, {kind} takes one; give "
                f"one rank, or use --moa.method {'moa_kron' if self.kronecker else 'moa_lora'}"
            )
        if self.shared_rank < 0 or (self.shared_rank and not self.mixes):
            found.append(
                f"moa.shared_rank: {self.shared_rank} with {kind}; must be >= 0, and above 0 only "
                "with multi_lora, moa_lora or moa_kron"
            )
        if self.kron_dim < 1:
            found.append(f"moa.kron_dim: {self.kron_dim}; must be >= 1")
        if self.kron_impl == "dense" and not self.kronecker:
            found.append(
                f"moa.kron_impl: 'dense' with {kind}, which has no Kronecker experts; leave it at "
                "factored, or use --moa.method moa_kron or kadaptation"
            )
        if not 0 <= self.expert_dropout < 1:
            found.append(f"moa.expert_dropout: {self.expert_dropout}; must be >= 0 and below 1")
        return found

    def _wrong_routing(self) -> list[str]:
        whole, found = self.resolved(), []
        if self.method == "multi_lora" and whole.router != "uniform":
            found.append(
                f"moa.router: {self.router!r} with multi_lora, which is the uniform mixture; use "
                "--moa.method moa_lora with it"
            )
        number, keeps_all = len(whole.ranks or ()), whole.router in ("soft", "uniform")
        if self.mixes and not 1 <= self.top_k <= number:
            found.append(f"moa.top_k: {self.top_k}; legal is 1 to the number of experts, {number}")
        elif self.mixes and keeps_all and self.top_k != 1:
            found.append(
                f"moa.top_k: {self.top_k} with router {whole.router!r}, which keeps every expert; "
                "leave it at 1, or use --moa.router cosine or linear"
            )
        if self.balance == "bias" and self.mixes and keeps_all:
            found.append(
                f"moa.balance: 'bias' with router {whole.router!r}, which chooses nothing; leave "
                "it at loss, or use --moa.router cosine or linear"
            )
        if self.router_dim < 1:
            found.append(f"moa.router_dim: {self.router_dim}; must be >= 1")
        for name in ("gate_noise", "aux_weight", "balance_rate"):
            if not 0 <= getattr(self, name) < float("inf"):
                found.append(f"moa.{name}: {getattr(self, name)}; must be a finite number >= 0")
        return found

    def check(self) -> None:
        """Raises `MoAConfigError` with every problem, one a line."""
        if problems := self.problems():
            raise MoAConfigError("\n".join(problems))


def select_blocks(blocks: str | tuple[int, ...], depth: int) -> list[int]:
    """The block numbers that a `blocks` setting selects in a model of `depth` blocks.

    Raises:
        MoAConfigError: a listed block does not exist, or `last_K` asks for more than there are.
    """
    if not isinstance(blocks, str):
        bad = [b for b in blocks if not 0 <= b < depth]
        if bad or not blocks:
            raise MoAConfigError(
                f"moa.blocks: {list(blocks)}; the model has blocks 0 to {depth - 1}, list one or "
                "more of them"
            )
        return sorted(set(blocks))
    match = _BLOCKS.fullmatch(blocks)
    if match is None:
        raise MoAConfigError(f"moa.blocks: {blocks!r}; legal are all, every_K, last_K, or a list")
    if blocks == "all":
        return list(range(depth))
    number = int(match[2])
    if match[1] == "every":
        return list(range(0, depth, number))
    if number > depth:
        raise MoAConfigError(f"moa.blocks: {blocks!r}; the model has only {depth} blocks")
    return list(range(depth - number, depth))
