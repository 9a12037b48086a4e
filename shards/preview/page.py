"""The page that shows a set, and the list of images that look alike."""

import base64
import csv
import html
import io
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from shards.preview.contents import Contents
from shards.read.naming import printable
from shards.write.survey import LookAlikes

_MOST_GROUPS, _PER_GROUP = 50, 8  # of look-alikes on the page
_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em }}
table {{ border-collapse: collapse; margin: 0.6em 0 }}
th, td {{ border-bottom: 1px solid #ddd; padding: 0.15em 0.8em; text-align: right }}
th:first-child, td:first-child {{ text-align: left }}
figure {{ display: inline-block; margin: 0 0.6em 0.4em 0; font-size: 11px }}
img {{ max-width: 100% }} .note {{ color: #a33 }} .all {{ max-height: 36em; overflow: auto }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def page(contents: Contents, sheet: bytes) -> str:
    """The page, with the sheet in it; needs no other file."""
    index, counts = contents.index, contents.counts
    split = "DomainBed's" if index.group_by is None else f"of groups, {index.group_by}"
    about = (
        f"{contents.summary()}; dataset {index.dataset}, index {index.sha256[:16]}, split: {split}"
    )
    rows = [[name, *of_class, sum(of_class)]
            for name, of_class in zip(index.classes, counts.T.tolist(), strict=True)]  # fmt: skip
    rows.append(["all", *counts.sum(1).tolist(), int(counts.sum())])
    parts = [
        f"<p>{_text(about)}</p>",
        *(f'<p class="note">{_text(note)}</p>' for note in contents.notes),
        f'<img alt="contact sheet" src="{_source(sheet)}">',
        "<h2>Images of each class</h2>",
        _table(["class", *index.domains, "all"], rows),
    ]
    if contents.seen:
        columns = ["domain", "formats", "smallest", "median", "largest", "unusable"]
        rows = [[name, *_sizes(seen)]
                for name, seen in zip(index.domains, contents.seen, strict=True)]  # fmt: skip
        groups, shown = contents.groups, contents.groups[:_MOST_GROUPS]
        parts += [
            "<h2>Formats and sizes</h2>",
            _table(columns, rows),
            "<h2>Images that look alike</h2>",
            f"<p>{len(shown)} of {len(groups)} groups; look_alikes.csv has all.</p>"
            if groups
            else "<p>None found.</p>",
            *(_shown(contents, group) for group in shown),
        ]
    return _PAGE.format(title=_text(index.name), body="\n".join(parts))


def listed(contents: Contents) -> bytes:
    """The images that look alike, as CSV."""
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["group", "key", "split", "format", "width", "height"])
    for number, group in enumerate(contents.groups):
        for domain, place, side in _members(group):
            kind, width, height, _ = contents.seen[domain][place]
            rows.writerow([number, contents.index.key(domain, place), side, kind, width, height])
    return file.getvalue().encode()


def _members(group: LookAlikes) -> Iterator[tuple[int, int, str]]:
    """Domain, place and side of the split of each image."""
    sides = np.where(group.held_out, "out", "in")
    return zip(group.domains.tolist(), group.places.tolist(), sides.tolist(), strict=True)


def _shown(contents: Contents, group: LookAlikes) -> str:
    """The pictures of a group."""
    what = [f"{len(group.places)} images"]
    what += ["on both sides of the split"] * group.crossing + ["in several domains"] * group.across
    figures = []
    for domain, place, side in itertools.islice(_members(group), _PER_GROUP):
        kind, width, height, _ = contents.seen[domain][place]
        class_name = contents.index.classes[contents.index.labels(domain)[place]]
        lines = (
            f"{contents.index.key(domain, place)}, {side}", class_name, f"{kind} {width} x {height}"
        )  # fmt: skip
        figures.append(
            f'<figure><img alt="" src="{_source(_png(contents.picture(domain, place)))}">'
            f"<figcaption>{'<br>'.join(map(_text, lines))}</figcaption></figure>"
        )
    return f"<h3>{', '.join(what)}</h3>{''.join(figures)}"


def _sizes(rows: npt.NDArray[np.void]) -> list[object]:
    """Formats of a domain's images; the smallest, median and largest size; how many are bad."""
    usable = rows[rows["format"] != ""]
    formats = Counter(usable["format"].tolist()).most_common()
    order = np.argsort(usable["width"].astype(np.int64) * usable["height"], kind="stable")
    sizes = [f"{row['width']} x {row['height']}"
             for row in usable[order[[0, len(order) // 2, -1]] if len(order) else []]]  # fmt: skip
    return [", ".join(f"{kind} {count}" for kind, count in formats), *(sizes or ["-"] * 3),
            len(rows) - len(usable)]  # fmt: skip


def _png(picture: npt.NDArray[np.uint8]) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def _source(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _text(value: object) -> str:
    """A value as HTML shows it; names come from folders of strangers."""
    return html.escape(printable(str(value)))


def _table(columns: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in columns)
    body = "\n".join(f"<tr>{''.join(f'<td>{_text(v)}</td>' for v in row)}</tr>" for row in rows)
    return f'<div class="all"><table><tr>{head}</tr>\n{body}</table></div>'
