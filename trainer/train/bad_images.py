"""Images of the training stream that could not be used: counted over all ranks, and limited."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shards.stream import bad_samples
from shards.stream.stream import DomainStream

PREFIX = "moa/bad/"
"""Of the keys in `metrics.jsonl` and `results.jsonl`: `moa/bad/<domain>/<reason>`."""


class BadImages:
    """Running counts per domain and reason, the same on every rank.

    At most the share `limit` of a domain's images may be replaced. `named` are the counts of a
    resumed run, from `state`.
    """

    def __init__(self, stream: DomainStream, limit: float, named: Mapping[str, int]) -> None:
        self.stream, self.limit = stream, limit
        self.domains = stream.index.domains
        self.total = bad_samples.counts_from_names(named, self.domains)
        self._new: Tensor | None = None

    def note(self, bad: Sequence[bad_samples.BadSample]) -> None:
        """Adds what this rank met in one batch."""
        if bad:
            new = bad_samples.count_bad(bad, len(self.domains))
            self._new = new if self._new is None else self._new + new

    def of_step(self) -> list[float]:
        """What this rank met since the last call, to be summed over the ranks."""
        new, self._new = self._new, None
        return [0.0] * self.total.numel() if new is None else new.double().flatten().tolist()

    def end_step(self, step: int, summed: Sequence[float]) -> None:
        """Adds what all ranks met in a step.

        Raises:
            DamagedDataError: too many images of a domain had to be replaced; on all ranks alike.
        """
        if any(summed):
            self.total += torch.tensor(summed, dtype=self.total.dtype).view_as(self.total)
        stream, drawn = self.stream, (step + 1) * self.stream.batch_per_domain
        sizes = {domain: stream.num_train(domain) for domain in stream.sources}
        bad_samples.check_bad_fraction(
            self.total, dict.fromkeys(sizes, drawn), sizes, self.domains, self.limit
        )

    def state(self) -> dict[str, int]:
        """Counts that are not zero, by `<domain>/<reason>`."""
        return bad_samples.named_counts(self.total, self.domains)

    def columns(self) -> dict[str, int]:
        """The same as columns of a row."""
        return {PREFIX + name: count for name, count in self.state().items()}
