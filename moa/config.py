"""`MoAConfig`: what is adapted and how. Imports nothing heavy, so `--help` stays fast."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_origin

from moa.blocks import BLOCKS
from moa.errors import MoAConfigError

Method = Literal[
    "full", "linear", "bias", "attention", "lora", "kadaptation", "multi_lora", "moa_lora",
    "moa_kron",
]  # fmt: skip
Router = Literal["cosine", "linear", "soft", "uniform"]

ADAPTER_METHODS = ("lora", "kadaptation", "multi_lora", "moa_lora", "moa_kron")
"""Methods that wrap linear layers; the others only choose what is trainable."""

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

# Settings that only methods with several experts use, and those that all adapters use.
_OF_MIXTURES = (
    "router", "router_dim", "top_k", "gate_noise", "balance", "aux_weight", "balance_rate",
    "transport", "diversity",
)  # fmt: skip
_OF_ADAPTERS = ("ranks", "expert_dropout")

_Rule = tuple[str, bool, str]  # a setting, whether it is wrong, and what is said after its value


def _is_whole(value: object) -> bool:
    """Whether it is a whole number, and one that a size can be."""
    return type(value) is int and abs(value) < 2**31


@dataclass(frozen=True, kw_only=True)
class MoAConfig:
    """Which layers get which adapters, and how tokens are routed (section 3 of the paper)."""

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
    diversity: float = 0.0
    """weight of a penalty, in the auxiliary loss, on the overlap of the experts of a layer: the sum
    over pairs of |A_i A_j^T|^2 / (|A_i|^2 |A_j|^2), A their first factors"""
    kron_dim: int = 64
    """size P of the shared Kronecker rule; divides the widths of every adapted layer"""
    kron_impl: Literal["factored", "dense"] = "factored"
    """factored (fast) or dense (forms every expert's matrix; for the paper's element dropout)"""
    expert_dropout: float = 0.0
    """dropout of the experts in training: on the matrix elements of dense Kronecker experts, as in
    the paper, else on each token's rank columns"""
    ep_size: int = 1
    """processes that share the experts of a mixture (expert parallelism); divides the number of
    all processes, does not change the result"""
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
        defaults = _DEFAULTS.get(self.method, ((), (), "all", None))
        usual = zip(("ranks", "targets", "blocks", "router"), defaults, strict=True)
        left_open: dict[str, Any] = {n: value for n, value in usual if getattr(self, n) is None}
        return replace(self, **left_open)

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
    def masked(self) -> bool:
        """Whether the experts may be used under dropout masks, which stay with the tokens."""
        return self.expert_dropout > 0 or self.kron_impl == "dense"

    @property
    def experts_kept(self) -> int:
        """Experts with a weight above zero per token."""
        whole = self.resolved()
        return self.top_k if whole.router in ("cosine", "linear") else len(whole.ranks or ())

    def problems(self) -> list[str]:
        """Every range problem of this configuration, one line each, empty if it is legal."""
        return list(self._wrong_types()) or [  # the other checks compare these values
            *self._wrong_choices(),
            *self._broken(self._rules()),
            *self._broken(self._expert_rules() if self.adapts else ()),
            *(self.transport_problems() if self.ep_size > 1 and self.adapts else ()),
            *self._broken(self._routing_rules() if self.mixes else ()),
        ]

    def _broken(self, rules: Iterable[_Rule]) -> Iterator[str]:
        for name, wrong, why in rules:
            value = getattr(self, name)
            if wrong:
                yield f"moa.{name}: {list(value) if isinstance(value, tuple) else value!r}{why}"

    def unused(self) -> list[str]:
        """Names of settings that were given, although the method does not use them.

        They must be legal all the same, and have no effect: one command or recipe can serve several
        methods.
        """
        used = dict.fromkeys(_OF_MIXTURES, self.mixes) | dict.fromkeys(_OF_ADAPTERS, self.adapts)
        used |= {"kron_dim": self.kronecker}
        used |= dict.fromkeys(("targets", "blocks"), self.adapts or self.unfreezes)
        default = MoAConfig(method=self.method)
        usual = (default, default.resolved())
        return [
            name
            for name, is_used in used.items()
            if not is_used and all(getattr(self, name) != getattr(each, name) for each in usual)
        ]

    def _wrong_types(self) -> Iterator[str]:
        """Values of another kind than their setting takes; a command line cannot give them."""
        kinds: dict[str, tuple[type, str]] = {"ranks": (int, "whole numbers >= 1")}
        kinds["targets"] = (str, "module paths such as attn.qkv")
        if not isinstance(self.blocks, str):
            kinds["blocks"] = (int, "block numbers")
        for name, (kind, legal) in kinds.items():
            value = getattr(self, name)
            fits = _is_whole if kind is int else (lambda item: isinstance(item, str))
            if value is not None and not (isinstance(value, tuple) and all(map(fits, value))):
                yield f"moa.{name}: {value!r}; give a list of {legal}"
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int and not _is_whole(value):
                yield f"moa.{field.name}: {value!r}; must be a whole number"
            if field.type is float and type(value) not in (int, float):
                yield f"moa.{field.name}: {value!r}; must be a number"

    def _wrong_choices(self) -> Iterator[str]:
        legal = {f.name: get_args(f.type) for f in fields(self) if get_origin(f.type) is Literal}
        for name, values in (legal | {"router": get_args(Router)}).items():
            value = getattr(self, name)
            if value not in values and (name, value) != ("router", None):
                yield f"moa.{name}: {value!r}; legal are {', '.join(values)}"

    def _rules(self) -> Iterator[_Rule]:
        """What every method must obey."""
        by_method = ("top_k",) if not self.mixes else ()
        yield from (
            ("targets", self.targets == () and (self.adapts or self.unfreezes),
             "; name at least one linear layer, such as [attn.qkv]"),
            ("blocks", isinstance(self.blocks, str) and not BLOCKS.fullmatch(self.blocks),
             "; legal are all, every_K, last_K (K >= 1), or a list of block numbers"),
            ("ranks", (self.ranks == () and self.adapts) or any(r < 1 for r in self.ranks or ()),
             "; give one or more whole numbers >= 1"),
            *((name, getattr(self, name) < 1, "; must be >= 1")
              for name in ("kron_dim", "router_dim", *by_method)),
            ("expert_dropout", not 0 <= self.expert_dropout < 1, "; must be >= 0 and below 1"),
            *((name, not 0 <= getattr(self, name) < 1e38, "; must be a finite number >= 0")
              for name in ("gate_noise", "aux_weight", "balance_rate", "diversity")),
            ("ep_size", self.ep_size < 1 or (self.ep_size > 1 and not self.mixes),
             f" with {self.method}; must be >= 1, and above 1 only with multi_lora, moa_lora or "
             "moa_kron, which have experts to distribute"),
        )  # fmt: skip

    def _expert_rules(self) -> Iterator[_Rule]:
        """What methods with adapters must obey."""
        number, kind = len(self.resolved().ranks or ()), self.method
        single, several = ("kadaptation", "moa_kron") if self.kronecker else ("lora", "moa_lora")
        yield from (
            ("ranks", self.mixes and number == 1,
             f" gives {kind} one expert; give two or more, or use --moa.method {single}"),
            ("ranks", not self.mixes and number > 1,
             f" has {number} experts, {kind} takes one; give one rank, or use --moa.method "
             f"{several}"),
            ("shared_rank", self.shared_rank < 0 or (self.shared_rank > 0 and not self.mixes),
             f" with {kind}; must be >= 0, and above 0 only with multi_lora, moa_lora or moa_kron"),
            ("kron_impl", self.kron_impl == "dense" and not self.kronecker,
             f" with {kind}, which has no Kronecker experts; leave it at factored, or use "
             "--moa.method moa_kron or kadaptation"),
        )  # fmt: skip

    def _routing_rules(self) -> Iterator[_Rule]:
        """What mixtures must obey."""
        router, number = self.resolved().router, len(self.resolved().ranks or ())
        keeps_all, remedy = router in ("soft", "uniform"), "use --moa.router cosine or linear"
        impossible = number > 0 and not 1 <= self.top_k <= number
        yield from (
            ("router", self.method == "multi_lora" and router != "uniform",
             " with multi_lora, which is the uniform mixture; use --moa.method moa_lora with it"),
            ("top_k", impossible, f"; legal is 1 to the number of experts, {number}"),
            ("top_k", keeps_all and self.top_k != 1 and not impossible,
             f" with router {router!r}, which keeps every expert; leave it at 1, or {remedy}"),
            ("diversity", self.diversity > 0 and self.ep_size > 1,
             f" with moa.ep_size {self.ep_size}, of whose experts no process holds all; use "
             "--moa.ep_size 1, or leave it at 0"),
            ("balance", self.balance == "bias" and keeps_all,
             f" with router {router!r}, which chooses nothing; leave it at loss, or {remedy}"),
        )  # fmt: skip

    def transport_problems(self) -> Iterator[str]:
        """What forbids the transport where experts are shared, a line or none."""
        if self.masked and self.transport == "all_to_all":
            yield (
                "moa.transport: 'all_to_all' with moa.expert_dropout or moa.kron_impl dense, whose "
                "masks stay with the tokens; use --moa.transport gather"
            )

    def check(self) -> None:
        """Raises `MoAConfigError` with every problem, one a line."""
        if problems := self.problems():
            raise MoAConfigError("\n".join(problems))
