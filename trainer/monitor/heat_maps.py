"""Which expert the tokens of a domain or class go to, as heat maps and in bits.

Letters: L layers, E experts.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from trainer.evaluate.drawing import GREY, canvas, literally, share_table

CELL_WIDTH, CELL_HEIGHT = 40, 22
PANELS = 4
"""Panels beside each other."""
MOST_ROWS = 40
"""Rows of a panel; of more classes those are shown whose routing is least like the average."""

Floats = npt.NDArray[np.float64]


@literally
def expert_heat_maps(
    counts: Floats, layers: Sequence[str], names: Sequence[str], title: str
) -> Figure:
    """A panel per layer: each row's tokens by expert, and what an expert tells of the row.

    Of the token `counts` [L, rows, E] a row without any is left out; `names` are those of the rows.
    """
    rows, note = _rows_shown(counts)
    experts = [f"e{expert}" for expert in range(counts.shape[-1])]
    wide, high = max(len(experts) * CELL_WIDTH, 180) + 24, len(rows) * CELL_HEIGHT + 76
    lines = -(-len(layers) // PANELS)
    figure, axes = canvas(min(PANELS, len(layers)) * wide - 24, lines * high - 10)
    told = f"per cent of the row's tokens, and the bits that the expert tells of it{note}"
    axes.text(0, -24, title, size=18)
    axes.text(0, -6, told, size=12, color=GREY)
    for number, (layer, table) in enumerate(zip(layers, counts, strict=True)):
        left, top = number % PANELS * wide, number // PANELS * high + 46
        axes.text(left, top - 22, layer, size=13)
        axes.text(left, top - 7, f"{mutual_information(table):.3f} bit", size=12, color=GREY)
        share_table(
            axes, table[rows], (left, top), (CELL_WIDTH, CELL_HEIGHT),
            () if left else [names[row] for row in rows], experts,
        )  # fmt: skip
    return figure


def _rows_shown(counts: Floats) -> tuple[list[int], str]:
    """The rows to show in order, and a remark if these are not all."""
    seen = np.flatnonzero(counts.sum((0, 2)))
    if len(seen) <= MOST_ROWS:
        return seen.tolist(), ""
    telling = np.sum([specialisation(table) for table in counts], axis=0)
    most = np.sort(seen[np.argsort(-telling[seen], kind="stable")[:MOST_ROWS]])
    return most.tolist(), f"; the {MOST_ROWS} most specialised of {len(seen)}"


def mutual_information(counts: Floats) -> float:
    """Mutual information of row and column of a table of counts [rows, columns], in bits.

    I = sum over cells of p(row, column) log2[p(row, column) / (p(row) p(column))], with p the
    counts divided by their sum. Between 0, when every row has the same distribution over columns,
    and the smaller of the two entropies. A table without counts has 0.
    """
    return float(specialisation(counts).sum())


def specialisation(counts: Floats) -> Floats:
    """Each row's part [rows] of the mutual information; none is negative."""
    if counts.sum() == 0:
        return np.zeros(len(counts))
    joint = counts / counts.sum()
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    ratio = np.divide(joint, apart, out=np.ones_like(joint), where=joint > 0)
    parts: Floats = (joint * np.log2(ratio)).sum(1)
    return parts.clip(min=0.0)
