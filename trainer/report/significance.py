"""Whether one method beats another: exact sign-flip tests on paired differences.

Two methods are compared where both have a result for the same dataset, held-out domain and seeds;
such a pair shares split, images and order. If the methods were equal, either one's name could stand
on either number, so every difference could as well have the other sign. The test counts the share
of all sign patterns whose mean difference is at least as far from zero as the observed one.

That holds for pairs that are independent of each other. Pairs with the same held-out domain are not
quite, so a second test flips whole domains: it asks whether the difference would hold in other
domains, and with few domains it cannot give a small p (2 / 2^domains at the least).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from trainer.process.errors import ConfigError
from trainer.report.runs import Seeds
from trainer.report.scores import Score

EXACT_UP_TO = 2**18
"""Sign patterns that are all tried; beyond that as many random ones, always the same."""

Pair = tuple[str, int, Seeds]
"""Dataset, held-out domain, repetition."""


@dataclass(frozen=True)
class Comparison:
    """One method against another.

    Attributes:
        difference: mean over pairs of the one's result minus the other's.
        better: pairs in which the one is better.
        p_pairs: two-sided p if pairs flip one by one.
        p_domains: the same if all pairs of a held-out domain flip together.
        p_adjusted: `p_pairs` adjusted by Holm for all comparisons made with it.
    """

    method: str
    baseline: str
    difference: float
    pairs: int
    better: int
    p_pairs: float
    p_domains: float
    p_adjusted: float = 1.0


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of a mean difference under flips of each difference's sign."""
    if not any(differences) or len(differences) == 1:
        return 1.0  # both signs of one difference are equally far from zero
    if 2 ** len(differences) <= EXACT_UP_TO:
        totals = np.zeros(1)
        for difference in differences:
            totals = np.concatenate([totals + difference, totals - difference])
        least = abs(totals[0]) - 1e-12  # the signs as they are come first; ties count
        return float(np.mean(np.abs(totals) >= least))
    from scipy.stats import permutation_test  # here: it takes a second to import

    result = permutation_test(
        (np.asarray(differences, dtype=np.float64),), np.mean, permutation_type="samples",
        n_resamples=EXACT_UP_TO, rng=np.random.default_rng(0), vectorized=True, batch=4096,
    )  # fmt: skip
    return float(result.pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjustment of p-values for the number of comparisons, in the given order."""
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = highest
    return adjusted


def compare(scored: Sequence[Score], baseline: str) -> list[Comparison]:
    """Compares rows with `baseline`, or each two of them if that is `all`.

    Rows without a pair in common are left out. `ConfigError` if no row has that name.
    """
    results: dict[str, dict[Pair, float]] = defaultdict(dict)
    for score in scored:
        if score.result is not None:
            run = score.run
            results[score.label][run.dataset, run.held_out[0], run.seeds] = score.result
    if baseline == "all":
        couples = [(b, a) for a, b in combinations(results, 2)]
    elif baseline in results:
        couples = [(label, baseline) for label in results if label != baseline]
    else:
        raise ConfigError(f"--compare {baseline}: no such row; legal are all, {', '.join(results)}")
    couples = [(a, b) for a, b in couples if results[a].keys() & results[b].keys()]
    found = [_compared(a, b, results[a], results[b]) for a, b in couples]
    adjusted = holm([comparison.p_pairs for comparison in found])
    return [replace(c, p_adjusted=p) for c, p in zip(found, adjusted, strict=True)]


def _compared(
    method: str, baseline: str, one: Mapping[Pair, float], other: Mapping[Pair, float]
) -> Comparison:
    pairs = {pair: one[pair] - other[pair] for pair in one if pair in other}
    differences = list(pairs.values())
    by_domain: dict[tuple[str, int], float] = defaultdict(float)
    for (dataset, env, _), difference in pairs.items():
        by_domain[dataset, env] += difference
    return Comparison(
        method, baseline, difference=float(np.mean(differences)), pairs=len(pairs),
        better=sum(difference > 0 for difference in differences),
        p_pairs=sign_flip_p(differences), p_domains=sign_flip_p(list(by_domain.values())),
    )  # fmt: skip
