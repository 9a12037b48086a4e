"""The images that are predicted: files of a folder or a list, or the samples of a shard set."""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from shards import DataConfig, Decoder, ShardIndex
from shards.addresses import is_remote
from shards.pixels.decoding import undecodable_placeholder
from shards.pixels.transforms import LoaderTransform
from shards.read.layout import INDEX_NAME
from shards.read.subset import read_list
from shards.stream.bad_samples import BadSample
from shards.stream.batches import Batch, LoadedImage, made, stack
from shards.stream.one_image import OpenedImage, open_image
from shards.write.listing import EXTENSIONS
from trainer.process.errors import ConfigError


@dataclass(frozen=True)
class Images:
    """Files by their paths, or samples of a shard set by their keys.

    Attributes:
        passed_over: how many files of a folder are no images by their names.
        places: domain and place of each sample of `index`.
    """

    names: Sequence[str]
    passed_over: int = 0
    index: ShardIndex | None = None
    places: Sequence[tuple[int, int]] = ()

    def open(self, number: int, decoder: Decoder) -> OpenedImage:
        """The image of this number, or what is wrong with it."""
        if self.index is not None:
            return open_image(self.index, *self.places[number], decoder)
        name = self.names[number]
        try:
            if not stat.S_ISREG(os.stat(name).st_mode):
                raise ValueError("no regular file")  # a pipe would keep us waiting
            pixels, truncated = decoder(Path(name).read_bytes())
        except (OSError, ValueError, MemoryError) as error:
            detail = getattr(error, "strerror", None) or str(error) or "too large"
            return OpenedImage(None, 0, BadSample(0, name, "", 0, "undecodable", detail))
        cut = BadSample(0, name, "", 0, "truncated", "incomplete") if truncated else None
        return OpenedImage(pixels, 0, cut)


def load_batch(
    images: Images, transform: LoaderTransform, decoder: Decoder, numbers: range
) -> Batch:
    """Reads, decodes and transforms some images; a grey one stands for what cannot be used."""

    def loaded(number: int) -> LoadedImage:
        found = images.open(number, decoder)
        pixels = undecodable_placeholder() if found.pixels is None else found.pixels
        image, draw = made(transform, pixels, 0)  # nothing is drawn
        bad = [] if found.bad is None else [found.bad]
        return LoadedImage(image, 0, 0, found.pixels is None, bad, draw)

    return stack(map(loaded, numbers), len(numbers), numbers[0])


def images_at(where: str | Sequence[str], config: DataConfig) -> Images:
    """What a folder, a list, a shard set or an image file holds; or the files of these paths.

    Raises:
        ConfigError, DataConfigError: there is nothing, or it cannot be read.
        DamagedDataError: the shard set is not what its index promises.
    """
    if not isinstance(where, str):
        found = Images(where)
    elif is_remote(where) or (Path(where) / INDEX_NAME).is_file():
        return _samples(ShardIndex.load(where, config))
    elif Path(where).is_dir():
        found = _below(where)
    elif where.lower().endswith(EXTENSIONS):
        found = Images([where])
    else:
        found = Images(read_list(f"--images {where}", Path(where)))
    if not found.names:
        raise ConfigError(
            f"--images {where}: names no image; those of a folder end in {' '.join(EXTENSIONS)} "
            "(upper or lower case), a list may name any file"
        )
    return found


def _samples(index: ShardIndex) -> Images:
    """All samples; where they are remote in the order of the shards, to need each only once."""
    numbers = range(len(index.domains))
    places = [(env, place) for env in numbers for place in range(index.num_samples(env))]
    if index.remote:
        places.sort(key=lambda p: index.table(p[0])[p[1]][["shard", "offset"]].item())
    return Images([index.key(*place) for place in places], index=index, places=places)


def _below(folder: str) -> Images:
    """The images of a folder and of those in it, as `shards.writer` orders them."""
    walk = sorted(os.walk(folder, onerror=_refuse, followlinks=True))
    files = [os.path.join(place, name) for place, _, names in walk for name in sorted(names)]
    images = [path for path in files if path.lower().endswith(EXTENSIONS)]
    return Images(images, len(files) - len(images))


def _refuse(error: OSError) -> NoReturn:
    raise ConfigError(
        f"--images: {error.filename} cannot be listed ({error.strerror}); check its permissions, "
        "or give a list of images"
    ) from error
