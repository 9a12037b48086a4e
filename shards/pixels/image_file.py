"""Any image file to RGB by Pillow, which also says what is wrong with one; needs no torch."""

import io
import warnings

from PIL import Image, ImageFile, UnidentifiedImageError


def open_rgb(data: bytes, *, incomplete: bool = False) -> Image.Image:
    """Decode a file; EXIF rotation is ignored. `incomplete` takes what there is of a cut one.

    Raises `ValueError`: Pillow cannot read it; says why.
    """
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = incomplete  # Pillow has no other way to say it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of EXIF and palette oddities that change no pixel
            with Image.open(io.BytesIO(data)) as image:
                return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError("of no known format") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def is_too_large(data: bytes) -> bool:
    """Tell from a file's header whether Pillow refuses it for its size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            Image.open(io.BytesIO(data)).close()
        except Image.DecompressionBombError:
            return True
        except (OSError, ValueError, SyntaxError):
            pass  # whoever decodes it says what is wrong
    return False
