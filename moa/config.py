"""`MoAConfig`: what is adapted and how. Imports nothing heavy, so `--help` stays fast."""

import re
from dataclasses import dataclass, replace
from typing import Literal, get_args

from moa.errors import MoAConfigError

Method = Literal["full", "linear", "lora", "kadaptation", "moa_lora", "moa_kron"]

ADAPTER_METHODS = ("lora", "kadaptation", "moa_lora", "moa_kron")
"""Methods that wrap linear layers; `full` and `linear` only choose what is trainable."""

_BLOCKS = re.compile(r"all|(every|last)_([1-9]\d*)")

# Per method: ranks, targets, blocks. `lora` is the paper's baseline (r = 2 on qkv and proj of all
# blocks); the mixtures adapt qkv of every second block ("every qkv" in the paper).
_DEFAULTS: dict[str, tuple[tuple[int, ...], tuple[str, ...], str]] = {
    "lora": ((2,), ("attn.qkv", "attn.proj"), "all"),
    "kadaptation": ((1,), ("attn.qkv", "attn.proj"), "all"),
    "moa_lora": ((1, 2, 4, 8), ("attn.qkv",), "every_2"),
    "moa_kron": ((1, 2, 4, 8), ("attn.qkv",), "every_2"),
}


@dataclass(frozen=True, kw_only=True)
class MoAConfig:
    """Which layers get which adapters, and how tokens are routed (design: paper section 3)."""

    method: Method = "moa_kron"
    """full (everything trains), linear (the head only), lora and kadaptation (one adapter a layer),
    moa_lora and moa_kron (several adapters of different rank and a router)"""
    ranks: tuple[int, ...] | None = None
    """rank of each expert; default [1, 2, 4, 8] for the mixtures, [2] for lora, [1] for
    kadaptation"""
    router: Literal["cosine"] = "cosine"
    """kind of router"""
    router_dim: int = 256
    """dimension in which the cosine router compares a token with the experts' embeddings"""
    top_k: int = 1
    """experts kept per token; their softmax weights are not renormalised"""
    gate_noise: float = 1.0
    """standard deviation of the training noise on the router logits, divided by the number of
    experts"""
    aux_weight: float = 0.01
    """weight of the load balancing loss"""
    kron_dim: int = 64
    """size P of the shared Kronecker rule; divides the widths of every adapted layer"""
    targets: tuple[str, ...] | None = None
    """linear layers inside a block, as module paths such as attn.qkv (shell wildcards allowed);
    default [attn.qkv], for lora and kadaptation [attn.qkv, attn.proj]"""
    blocks: str | tuple[int, ...] | None = None
    """all, every_K (blocks 0, K, 2K ...), last_K, or a list of block numbers; default every_2, for
    lora and kadaptation all"""

    def __post_init__(self) -> None:
        """Turns lists, as YAML and JSON give them, into tuples."""
        for name in ("ranks", "targets", "blocks"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)

    def resolved(self) -> "MoAConfig":
        """The same configuration with the method's defaults where something was left open."""
        ranks, targets, blocks = _DEFAULTS.get(self.method, ((), (), "all"))
        return replace(
            self,
            ranks=ranks if self.ranks is None else self.ranks,
            targets=targets if self.targets is None else self.targets,
            blocks=blocks if self.blocks is None else self.blocks,
        )

    @property
    def adapts(self) -> bool:
        """Whether the method wraps linear layers."""
        return self.method in ADAPTER_METHODS

    @property
    def kronecker(self) -> bool:
        """Whether the experts are Kronecker adapters rather than LoRA."""
        return self.method in ("kadaptation", "moa_kron")

    @property
    def routed(self) -> bool:
        """Whether a router chooses among several experts."""
        return self.method in ("moa_lora", "moa_kron")

    def problems(self) -> list[str]:
        """Every range problem of this configuration, one line each, empty if it is legal."""
        legal = {"method": get_args(Method), "router": ("cosine",)}
        found = [
            f"moa.{name}: {getattr(self, name)!r}; legal are {', '.join(values)}"
            for name, values in legal.items()
            if getattr(self, name) not in values
        ]
        if not self.adapts:
            return found
        whole = self.resolved()
        ranks, top_k = whole.ranks or (), self.top_k
        if not ranks or any(r < 1 for r in ranks):
            found.append(f"moa.ranks: {list(ranks)}; give one or more whole numbers >= 1")
        if self.routed and len(ranks) == 1:
            found.append(
                f"moa.ranks: {list(ranks)} gives {self.method} one expert; give two or more, or "
                f"use --moa.method {'kadaptation' if self.kronecker else 'lora'}"
            )
        if not self.routed and len(ranks) > 1:
            found.append(
                f"moa.ranks: {list(ranks)} has {len(ranks)} experts, {self.method} takes one; give "
                f"one rank, or use --moa.method {'moa_kron' if self.kronecker else 'moa_lora'}"
            )
        if self.routed and not 1 <= top_k <= len(ranks):
            found.append(f"moa.top_k: {top_k}; legal is 1 to the number of experts, {len(ranks)}")
        for name in ("router_dim", "kron_dim"):
            if getattr(self, name) < 1:
                found.append(f"moa.{name}: {getattr(self, name)}; must be >= 1")
        for name in ("gate_noise", "aux_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                found.append(f"moa.{name}: {getattr(self, name)}; must be a finite number >= 0")
        if not whole.targets:
            found.append("moa.targets: []; name at least one linear layer, such as [attn.qkv]")
        if isinstance(whole.blocks, str) and not _BLOCKS.fullmatch(whole.blocks):
            found.append(
                f"moa.blocks: {self.blocks!r}; legal are all, every_K, last_K (K >= 1), or a list "
                "of block numbers"
            )
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
