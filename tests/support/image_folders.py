"""An image folder as users have them: four domains, mixed formats, odd names, broken files."""

import io
from pathlib import Path

from PIL import Image

from shards.embedded.digits import scans
from shards.embedded.drawing import draw

STYLES = {
    "photo": "plain",
    "clip art": "textured",
    "Aquarell-Übung": "inverted",
    "sketch": "outline",
}
"""Domain folders and the style their pictures are drawn in."""

CLASSES = ("zero", "one", "two")


def make_own_images(root: Path) -> None:
    """Draws 4 domains x 3 classes x about 20 images, three of them broken."""
    pixels, labels = scans()
    for number in range(240):
        label = int(labels[number])
        if label >= len(CLASSES):
            continue
        for domain, style in STYLES.items():
            path = root / domain / CLASSES[label] / _file_name(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            data = io.BytesIO()
            kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
            Image.fromarray(draw(pixels[number], style, number)).resize((64, 48)).save(data, kind)
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
