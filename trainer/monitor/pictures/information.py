"""What knowing a token's expert tells of its image's domain or class, in bits."""

import numpy as np
import numpy.typing as npt

Table = npt.NDArray[np.float64]


def mutual_information(counts: Table) -> float:
    """Mutual information of row and column of a table of counts [rows, columns], in bits.

    I = sum over cells of p(row, column) log2[p(row, column) / (p(row) p(column))], with p the
    counts divided by their sum. Between 0, when every row has the same distribution over columns,
    and the smaller of the two entropies. A table without counts has 0.
    """
    return float(specialisation(counts).sum())


def specialisation(counts: Table) -> Table:
    """Each row's part [rows] of the mutual information; none is negative."""
    if counts.sum() == 0:
        return np.zeros(len(counts))
    joint = counts / counts.sum()
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    ratio = np.divide(joint, apart, out=np.ones_like(joint), where=joint > 0)
    parts: Table = (joint * np.log2(ratio)).sum(1)
    return parts.clip(min=0.0)
