"""An image folder as users have them: four domains, mixed formats, odd names, broken files."""

import io
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from shards.embedded.digits import unpack_digits

STYLES = {
    "photo": "plain",
    "clip art": "textured",
    "Aquarell-Übung": "inverted",
    "sketch": "outline",
}
"""Domain folders and the embedded domain their pictures are taken from."""

CLASSES = ("zero", "one", "two")


def make_own_images(root: Path) -> None:
    """Makes 4 domains x 3 classes x 20 images, three of them broken."""
    with TemporaryDirectory() as digits:
        unpack_digits(digits)
        for domain, style in STYLES.items():
            for label, name in enumerate(CLASSES):
                (root / domain / name).mkdir(parents=True, exist_ok=True)
                drawn = sorted(Path(digits, style, str(label)).iterdir())[:20]
                for number, source in enumerate(drawn):
                    path = root / domain / name / _file_name(number)
                    kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
                    with Image.open(source) as image, io.BytesIO() as data:
                        image.resize((64, 48)).save(data, kind)
                        path.write_bytes(data.getvalue())
    break_files(root)


def _file_name(number: int) -> str:
    names = (f"{number}.png", f"IMG {number}.JPG", f"v2.{number}.final.jpeg", f"größe-{number}.png")
    return names[number % len(names)]


def break_files(root: Path) -> list[Path]:
    """Spoils three images: one cut short, one empty, one that is a web page."""
    victims = [sorted((root / domain / "zero").iterdir())[0] for domain in list(STYLES)[:3]]
    whole = victims[0].read_bytes()
    victims[0].write_bytes(whole[: len(whole) // 2])
    victims[1].write_bytes(b"")
    victims[2].write_text("<html>404 not found</html>", encoding="utf-8")
    return victims
