"""What the preview knows of a set, and single pictures of it."""

import numpy as np
import numpy.typing as npt

from shards.config import DataConfig
from shards.errors import DamagedDataError
from shards.read.index import ShardIndex
from shards.stream.split import split_domain
from shards.write.survey import LookAlikes, class_counts, find_look_alikes, imbalances, survey, told

SIDE = 64
"""Pixels of a picture's square."""
_BACKGROUND, _UNUSABLE = (236, 236, 236), (220, 120, 120)


class Contents:
    """A set that is looked at.

    Attributes:
        counts: int64 [domains, classes].
        notes: what is odd about it, a line each.
        seen: of every domain, from `survey`; empty before `look`.
        groups: of images that look alike, those that matter most first.
    """

    def __init__(self, index: ShardIndex, trial_seed: int, max_pixels: int) -> None:
        self.index, self.trial_seed, self.max_pixels = index, trial_seed, max_pixels
        self.counts = class_counts(index)
        self.notes = imbalances(index, self.counts)
        self.seen: list[npt.NDArray[np.void]] = []
        self.groups: list[LookAlikes] = []

    def look(self, jobs: int) -> None:
        """Look at every image."""
        self.seen = survey(self.index, jobs, self.max_pixels)
        held_out = [
            split_domain(self.index, domain, self.trial_seed, DataConfig.holdout_fraction)[1]
            for domain in range(len(self.index.domains))
        ]
        groups = find_look_alikes(self.index, self.seen, held_out)
        self.groups = sorted(groups, key=lambda group: (not group.crossing, not group.across))
        if said := told(self.index, groups, self.trial_seed):
            self.notes.append(said)

    def picture(self, domain: int, place: int) -> npt.NDArray[np.uint8]:
        """One image in a square, uint8 [side, side, 3]; a reddish one if it cannot be used."""
        from PIL import Image

        from shards.pixels.image_file import open_rgb

        try:
            data = self.index.read(domain, place).image
            image = open_rgb(data, incomplete=True, max_pixels=self.max_pixels)
        except (DamagedDataError, ValueError):
            return np.full((SIDE, SIDE, 3), _UNUSABLE, np.uint8)
        scale = SIDE / max(image.size)
        width, height = (max(1, round(scale * side)) for side in image.size)
        square = Image.new("RGB", (SIDE, SIDE), _BACKGROUND)
        small = image.resize((width, height), Image.Resampling.LANCZOS if scale < 1 else 0)
        square.paste(small, ((SIDE - width) // 2, (SIDE - height) // 2))
        return np.asarray(square)

    def summary(self) -> str:
        """How much there is of what."""
        domains, classes = self.counts.shape
        return f"{self.counts.sum()} images, {domains} domains, {classes} classes"
