"""Settings of the averages of the weights (`trainer/engine/averaging.py`); imports no torch."""

from dataclasses import dataclass

from trainer.config.limits import FROM_0, FROM_1, NUMBER, SEED, SHARE, out_of_range

AVERAGES = ("ema", "swad", "beta", "uniform")
"""What they are called in rows, curves and folders."""


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Averages of the trained weights over the steps, evaluated and saved beside the last ones."""

    ema: bool = False
    """keep an exponential moving average, saved in adapter-ema/"""
    ema_decay: float = 0.999
    """its decay per step"""
    ema_warmup: bool = True
    """let the decay grow with the steps as 1 - (1 + step)^(-2/3), up to ema_decay"""
    swad: bool = False
    """average all steps within the valley of the validation loss, saved in adapter-swad/"""
    swad_n_converge: int = 3
    """evaluations by which the valley's start is recognised"""
    swad_n_tolerance: int = 6
    """evaluations in a row above the valley's level that end it"""
    swad_tolerance_ratio: float = 1.3
    """the valley's level as a multiple of the mean validation loss at its start"""
    beta: float = 0.0
    """average of all steps from before the first to the last, weighted by the density of
    Beta(beta, beta): below 1 heavy at both ends, 1 even; 0 is off; saved in adapter-beta/"""
    uniform: int | None = None
    """plain average of the steps from this one on, saved in adapter-uniform/"""

    @property
    def names(self) -> tuple[str, ...]:
        """Those of `AVERAGES` that are kept."""
        kept = (self.ema, self.swad, self.beta, self.uniform is not None)
        return tuple(name for name, keeps in zip(AVERAGES, kept, strict=True) if keeps)

    @property
    def swad_copies(self) -> int:
        """Most copies of the weights that SWAD holds: of the kept, open and waiting segments."""
        return 2 + (self.swad_n_tolerance - 1)

    def problems(self) -> list[str]:
        """Every range problem, and what has no effect, one line each."""
        found = [
            f"average.{name}: has no effect without --average.{switch} true; add that, or leave "
            f"{name} out"
            for name, switch in (
                ("ema_decay", "ema"), ("ema_warmup", "ema"), ("swad_n_converge", "swad"),
                ("swad_n_tolerance", "swad"), ("swad_tolerance_ratio", "swad"),
            )
            if getattr(self, name) != getattr(AverageConfig, name) and not getattr(self, switch)
        ]  # fmt: skip
        found += out_of_range(
            "average", self, ema_decay=SHARE, swad_n_converge=NUMBER, swad_tolerance_ratio=FROM_1,
            beta=FROM_0,
        )  # fmt: skip
        if self.uniform is not None:
            found += out_of_range("average", self, uniform=SEED)
        if 1 <= self.swad_n_converge > self.swad_n_tolerance:
            found.append(
                f"average.swad_n_tolerance: {self.swad_n_tolerance}; must be a whole number >= "
                f"average.swad_n_converge ({self.swad_n_converge})"
            )
        return found
