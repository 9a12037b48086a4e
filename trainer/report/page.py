"""A report as one HTML page that can be sent: it loads nothing, and a browser runs nothing in it.

Whatever comes from a run folder is escaped, cut to a length, or drawn into a picture.
"""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from matplotlib.figure import Figure

from moa.files.markdown import visible
from trainer.evaluate.drawing import confusion_figure, png
from trainer.process.tables import Table, markup
from trainer.report.details import Confusion, confusion, environment, loss, routing, validation
from trainer.report.formats import comparison_table, result_table
from trainer.report.plots import Lines, bars_figure, curves_figure, has_numbers
from trainer.report.runs import Run
from trainer.report.scores import Score
from trainer.report.significance import Comparison
from trainer.report.tables import ResultTable

MOST_PICTURES = 6
"""Confusion matrices, and routing maps, of one page."""
INCHES = 11.5
"""Widest bars: a browser makes wider ones, and their names, smaller."""
MOST_NOTES = 40
LONGEST = 4000
"""Letters of a text that are shown."""
HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>Report</title><style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1160px; margin: 2em auto;
 padding: 0 1.5em }
h1 { margin-bottom: 0 } h2 { margin-top: 2em; border-bottom: 1px solid #ccc }
nav a { margin-right: 1.2em } section { overflow-x: auto }
table { border-collapse: collapse; margin: .6em 0 } caption { text-align: left; font-weight: 600;
 padding: .4em 0; white-space: nowrap }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; white-space: nowrap }
th { border-bottom-color: #888 } tbody tr:hover { background: #f3f6fa }
#runs table { font-size: 12px } #runs td { padding: .15em .55em }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 0 1em }
img { max-width: 100%; height: auto; display: block; margin: .6em 0 } figure { margin: 1em 0 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5; padding: .5em;
 margin: .2em 0 } .note { color: #555 } summary { cursor: pointer; overflow-wrap: anywhere }
</style></head><body>
"""
Found = TypeVar("Found")


def page(
    runs: Sequence[Run],
    tables: Iterable[ResultTable],
    comparisons: Mapping[str, Sequence[Comparison]],
    scored: Sequence[Score],
    notes: Sequence[str],
) -> bytes:
    """The page in ASCII; `scored` are the runs of the tables by the first rule.

    Comparisons come by the name of their rule and metric.
    """
    finished = sum(run.finished for run in runs)
    methods = len({score.label for score in scored})
    sections = {
        "results": _results(tables),
        "comparisons": "".join(
            f"<h3>{markup(name.replace('_', ' '))}</h3>{comparison_table(found).html()}"
            for name, found in comparisons.items()
            if found
        ),
        "curves": _curves(scored),
        "confusion": _confusions(scored),
        "routing": _routing(scored),
        "runs": _runs(runs, scored),
        "notes": _notes(notes),
    }
    there = [name for name, content in sections.items() if content]
    links = "".join(f'<a href="#{name}">{name}</a>' for name in there)
    parts = [
        HEAD,
        f'<h1>Report</h1><p class="note">{finished} finished runs of {len(runs)}, '
        f"{methods} rows</p><nav>{links}</nav>\n",
        *(f'<section id="{n}"><h2>{n.title()}</h2>{sections[n]}</section>\n' for n in there),
        "</body></html>\n",
    ]
    return "".join(parts).encode("ascii", "xmlcharrefreplace")


def _results(tables: Iterable[ResultTable]) -> str:
    found = []
    for table in tables:
        found.append(result_table(table).html())
        if has_numbers(table):
            found.append(_picture(bars_figure(table, INCHES), f"bars of {table.title}"))
    return "".join(found)


def _curves(scored: Sequence[Score]) -> str:
    """A figure per dataset, a row of panels per held-out domain, a line per run."""
    by_dataset: dict[str, dict[str, list[Lines]]] = {}
    for score in sorted(_one_per_run(scored), key=lambda score: score.run.held_out):
        run = score.run
        domains = by_dataset.setdefault(run.dataset, {})
        lines = Lines(score.label, loss(run), validation(run))
        domains.setdefault(run.domains[run.held_out[0]], []).append(lines)
    note = (
        "A line per run, coloured by row: loss of some steps, and mean accuracy on the sources' "
        "out splits."
    )
    figures = [
        _picture(curves_figure(domains, dataset), f"curves of {dataset}")
        for dataset, domains in by_dataset.items()
    ]
    return _note(note) + "".join(figures) if figures else ""


def _confusions(scored: Sequence[Score]) -> str:
    found = _first_of_rows(scored, confusion)
    by_classes: dict[tuple[str, ...], dict[str, Confusion]] = {}
    for name, one in found.items():
        by_classes.setdefault(one.classes, {})[name] = one
    figures = [
        confusion_figure({n: c.counts for n, c in of.items()}, classes, "held-out domain")
        for classes, of in by_classes.items()
    ]
    pictures = "".join(_picture(figure, "confusion matrices") for figure in figures)
    return _note(_which("evaluation.json")) + pictures if pictures else ""


def _routing(scored: Sequence[Score]) -> str:
    found = _first_of_rows(scored, routing)
    figures = [
        f"<figure><figcaption>{markup(_cut(name))}</figcaption>{_image(content, name)}</figure>"
        for name, content in found.items()
    ]
    if not figures:
        return ""
    return f'{_note(_which("routing.png"))}<div class="grid">{"".join(figures)}</div>'


def _which(name: str) -> str:
    return f"Of each row the first run that has {name}, and of {MOST_PICTURES} rows at most."


def _first_of_rows(
    scored: Sequence[Score], read: Callable[[Run], Found | None]
) -> dict[str, Found]:
    """What is read of the first run of each row that has it, by the run's name."""
    found: dict[str, Found] = {}
    rows: set[tuple[str, str]] = set()
    for score in _one_per_run(scored):
        run, row = score.run, (score.run.dataset, score.label)
        if row in rows or not run.finished:
            continue
        if len(found) == MOST_PICTURES:
            break
        if (one := read(run)) is not None:
            rows.add(row)
            domain = run.domains[run.held_out[0]]
            found[f"{score.label}, {domain} held out, {run.folder.name}"] = one
    return found


def _one_per_run(scored: Iterable[Score]) -> list[Score]:
    """Without those of further kinds of weights, whose run is the same."""
    first: dict[object, Score] = {}
    for score in scored:
        first.setdefault(score.run.folder, score)
    return list(first.values())


def _runs(runs: Sequence[Run], scored: Sequence[Score]) -> str:
    """Settings, result and hashes of each run as a table, and the commands below."""
    scores = {score.run.folder: score for score in _one_per_run(scored)}
    rows, commands = [], []
    for run in runs:
        score = scores.get(run.folder)
        command, commit = environment(run.folder)
        choice = score.choice if score else None
        row = [
            score.label if score else run.method,
            " + ".join(run.domains[env] for env in run.held_out), f"{run.seeds[0]}/{run.seeds[1]}",
            "-" if choice is None else str(choice.step),
            _percent(choice.accuracy if choice else None),
            _percent(choice.class_mean if choice else None),
            *(digest[:12] or "-" for digest in (
                run.data, run.split, str(run.settings.get("model.base_hash", "")), commit,
            )),
            str(run.folder.name) if run.finished else f"{run.folder.name} (unfinished)",
        ]  # fmt: skip
        rows.append([_cut(text, 80) for text in row])
        if command:
            summary, text = markup(_cut(str(run.folder))), markup(_cut(command))
            commands.append(f"<details><summary>{summary}</summary><pre>{text}</pre></details>\n")
    columns = (
        "row", "held out", "seed/trial", "step", "acc %", "class mean %", "data", "split",
        "weights", "commit", "folder",
    )  # fmt: skip
    table = Table(columns, rows, "runs, with hashes of their images, split, base weights and code",
                  align="llcrrrl").html()  # fmt: skip
    return table + ("<h3>Commands</h3>" + "".join(commands) if commands else "")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _notes(notes: Sequence[str]) -> str:
    more = [f"and {len(notes) - MOST_NOTES} more"] if len(notes) > MOST_NOTES else []
    items = [f"<li>{markup(_cut(note))}</li>" for note in [*notes[:MOST_NOTES], *more]]
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _cut(text: str, most: int = LONGEST) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def _note(text: str) -> str:
    return f'<p class="note">{markup(text)}</p>'


def _picture(figure: Figure, alt: str) -> str:
    return _image(png(figure), alt)


def _image(content: bytes, alt: str) -> str:
    data = base64.b64encode(content).decode()
    return f'<img alt="{markup(_cut(visible(alt), 200))}" src="data:image/png;base64,{data}">\n'
