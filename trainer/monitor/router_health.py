"""Warnings of collapsing routers: experts without tokens, one with all, choices without doubt."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

PATIENCE = 3
"""Notes in a row that must show a sign before it is a warning: one batch may lack anything."""
CONCENTRATED = 0.1
"""Entropy of the load, as a share of its largest value ln E, below which one expert does it all."""
SATURATED = 0.02
"""The same for the mean entropy of a token's probabilities, below which a router hardly learns."""


@dataclass
class RouterHealth:
    """Follows the routers from note to note.

    Attributes:
        balance: how the load is balanced, and the weight of the loss, for the remedy.
        signs: (layer, sign) -> notes in a row that showed it.
        active: what is warned of at present.
    """

    balance: str
    signs: dict[tuple[str, str], int] = field(default_factory=dict)
    active: set[tuple[str, str]] = field(default_factory=set)

    def note(self, stats: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
        """Takes in one note of all layers.

        Args:
            stats: layer path -> `load` (a share per expert) and `entropy` (one number, in nats).

        Returns:
            A line per new warning; one is repeated only after its sign was gone meanwhile.
        """
        shown = {
            (layer, sign): text
            for layer, values in stats.items()
            for sign, text in _signs(values["load"], values["entropy"][0])
        }
        self.signs = {key: self.signs.get(key, 0) + 1 for key in shown}
        before = self.active
        self.active = {key for key, times in self.signs.items() if times >= PATIENCE}
        return [
            f"router {key[0]}: {shown[key]}, in {PATIENCE} notes in a row; {self._remedy(key[1])}"
            for key in shown
            if key in self.active - before
        ]

    def _remedy(self, sign: str) -> str:
        if sign == "saturated":
            return "lower --optim.lr or raise --moa.gate_noise"
        return f"balance the load more strongly ({self.balance})"


def _signs(load: Sequence[float], entropy: float) -> list[tuple[str, str]]:
    """Name and words of every sign that one layer's note shows."""
    most = math.log(len(load)) if len(load) > 1 else 1.0
    found = [
        (f"dead {expert}", f"expert {expert} gets no token")
        for expert, share in enumerate(load)
        if share == 0
    ]
    spread = -sum(share * math.log(share) for share in load if share > 0) / most
    if len(load) > 1 and spread < CONCENTRATED:
        top = max(range(len(load)), key=lambda expert: load[expert])
        found.append(("concentrated", f"expert {top} gets {100 * load[top]:.1f} % of the tokens"))
    if len(load) > 1 and entropy / most < SATURATED:
        found.append(("saturated", f"its entropy is {entropy:.4f} of at most {most:.3f} nats"))
    return found
