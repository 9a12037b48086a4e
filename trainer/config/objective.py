"""Settings of what training minimises; imports no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What training minimises on the source domains, beside the balance of the experts."""

    name: Literal["erm"] = "erm"
    """erm: the mean cross-entropy of the global batch"""
