"""Warnings of collapsing routers: experts without tokens, one with all, choices without doubt."""

import math
from collections.abc import Iterator, Mapping, Sequence

PATIENCE = 3
"""Notes in a row that must show a sign before it is a warning: one batch may lack anything."""
CONCENTRATED = 0.1
"""Entropy of the load, as a share of its largest value ln E, below which one expert does it all."""
SATURATED = 0.02
"""The same for the mean entropy of a token's probabilities, below which a router hardly learns."""


class RouterHealth:
    """Follows the routers from note to note.

    Args:
        balance: how the load is balanced, and the weight of the loss, for the remedy.

    Attributes:
        active: (layer, sign) of what is warned of at present.
    """

    def __init__(self, balance: str) -> None:
        self.balance = balance
        self.active: set[tuple[str, str]] = set()
        self._in_a_row: dict[tuple[str, str], int] = {}

    def note(self, stats: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
        """A line per new warning; one is repeated only after its sign was gone meanwhile.

        `stats` has of each layer's path `load` (a share per expert) and `entropy` (one, in nats).
        """
        shown = {
            (layer, sign): text
            for layer, values in stats.items()
            for sign, text in _signs(values["load"], values["entropy"][0])
        }
        self._in_a_row = {key: self._in_a_row.get(key, 0) + 1 for key in shown}
        before = self.active
        self.active = {key for key, times in self._in_a_row.items() if times >= PATIENCE}
        stronger = f"balance the load more strongly ({self.balance})"
        slower = "lower --optim.lr or raise --moa.gate_noise"
        return [
            f"router {layer}: {text}, in {PATIENCE} notes in a row; "
            + (slower if sign == "saturated" else stronger)
            for (layer, sign), text in shown.items()
            if (layer, sign) in self.active - before
        ]


def _signs(load: Sequence[float], entropy: float) -> Iterator[tuple[str, str]]:
    """Name and words of every sign that one layer's note shows."""
    for expert, share in enumerate(load):
        if share == 0:
            yield f"dead {expert}", f"expert {expert} gets no token"
    if len(load) == 1:
        return
    most = math.log(len(load))
    if -sum(share * math.log(share) for share in load if share > 0) / most < CONCENTRATED:
        top = load.index(max(load))
        yield "concentrated", f"expert {top} gets {100 * load[top]:.1f} % of the tokens"
    if entropy / most < SATURATED:
        yield "saturated", f"its entropy is {entropy:.4f} of at most {most:.3f} nats"
