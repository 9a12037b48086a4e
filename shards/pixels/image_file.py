"""Any image file to RGB by Pillow, which also says what is wrong with one; needs no torch."""

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError

from shards.config import MAX_PIXELS

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "AVIF")
"""What Pillow may take a file for. Of what else it knows, EPS starts Ghostscript."""

SCALED = "scaled from 16 bits"
"""Key in `info` of an image whose grey levels were."""

_JPEG_SIZE = re.compile(rb"\xff[\xc0-\xcf]..\x08(..)(..)", re.DOTALL)
_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


class _TooLargeError(ValueError):
    """An image with more pixels than allowed."""


def open_rgb(data: bytes, *, incomplete: bool = False, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a file; EXIF rotation is ignored. `incomplete` takes what there is of a cut one.

    Grey of 16 bits is scaled to 8, and then `info` of the image has `SCALED`.

    Raises `ValueError`: Pillow cannot read it, it has more pixels than allowed, or its grey levels
    have no known range; says why.
    """
    with _pillow(max_pixels, incomplete), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return _eight_bits(image).convert("RGB")


class Glance(NamedTuple):
    """What a quick look at a file tells."""

    format: str
    """One of `FORMATS`."""
    size: tuple[int, int]
    """Width and height."""
    grey: npt.NDArray[np.uint8]
    """The whole picture in grey, [h, w]."""


def glance(data: bytes, size: tuple[int, int], *, max_pixels: int = MAX_PIXELS) -> Glance:
    """Look at a file, complete or not; gives it in grey at `size`, (width, height).

    Of JPEG files only as much is decoded as that needs. Raises `ValueError` as `open_rgb`.
    """
    with _pillow(max_pixels, True), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        found = image.format or "", image.size
        image.draft("L", (3 * size[0], 3 * size[1]))
        small = _eight_bits(image).convert("L").resize(size, Image.Resampling.BILINEAR)
        return Glance(*found, np.asarray(small))


def is_too_large(data: bytes, max_pixels: int) -> bool:
    """Tell from a JPEG file's header whether it has more pixels than allowed."""
    try:
        with _pillow(max_pixels):
            Image.open(io.BytesIO(data), formats=FORMATS[:1]).close()
    except _TooLargeError:
        return True
    except ValueError:  # libjpeg passes over bytes at which Pillow gives up
        sides = (map(int.from_bytes, match.groups()) for match in _JPEG_SIZE.finditer(data))
        return any(height * width > max_pixels for height, width in sides)
    return False


@contextlib.contextmanager
def _pillow(max_pixels: int, incomplete: bool = False) -> Iterator[None]:
    """Set Pillow's switches, which are global, and turn whatever it raises into `ValueError`."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = incomplete, max_pixels
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of EXIF and palette oddities that change no pixel
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except UnidentifiedImageError as error:
        raise ValueError("of no known format") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        size = str(error).partition(")")[0]  # Image size (123 pixels
        raise _TooLargeError(f"{size}), more than max_pixels = {max_pixels} allows") from error
    except Exception as error:  # damaged bytes make its readers raise errors of any kind
        raise ValueError(str(error) or type(error).__name__) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey, which Pillow would cut off at 255."""
    from_pnm = image.mode == "I" and image.format == "PPM"  # brought to 65535 by Pillow already
    if not (image.mode.startswith("I;16") or from_pnm):
        if image.mode in ("I", "F"):
            raise ValueError("grey levels of 32 bits without a known range; store 8 or 16 bits")
        return image
    tags = getattr(image, "tag_v2", {})
    top = 4095 if tags.get(_TIFF_BITS) == (12,) else 65535
    scale = ((np.arange(top + 1) * 255 + top // 2) // top).astype(np.uint8)
    if tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO:
        scale = scale[::-1]
    scaled = Image.fromarray(np.take(scale, np.asarray(image), mode="clip"))
    scaled.info[SCALED] = True
    return scaled
