"""The one table of all ranks' lines, and the exit code that it stands for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from trainer.doctor.lines import LEVELS, Line
from trainer.doctor.ranks import Told
from trainer.process.errors import FINISHED
from trainer.process.tables import Table


@dataclass(frozen=True)
class Row:
    """The worst line of a check, and whose it is."""

    line: Line
    where: str


def rows(told: Told) -> list[Row]:
    """A row for each check, in the order in which the ranks made them."""
    found: dict[str, list[tuple[int, Line]]] = {}
    for rank in sorted(told):
        for line in told[rank][1]:
            found.setdefault(line.check, []).append((rank, line))
    return [_row(lines, told) for lines in found.values()]


def _row(lines: Sequence[tuple[int, Line]], told: Told) -> Row:
    rank, worst = max(lines, key=lambda entry: (LEVELS.index(entry[1].level), entry[1].worse))
    alike = sum(line.level == worst.level for _, line in lines)
    if len(lines) > 1 and len({(line.level, line.found) for _, line in lines}) == 1:
        return Row(worst, f"all {len(lines)}")
    if len(lines) == 1 and worst.level == "ok":
        return Row(worst, "")
    more = f", {worst.level} on {alike - 1} more" if alike > 1 and worst.level != "ok" else ""
    return Row(worst, f"rank {rank} ({told[rank][0]}){more}")


def table(found: Iterable[Row], processes: int) -> Table:
    """As it is shown; with several processes it names the worst one."""
    cells = []
    for row in found:
        line = row.line
        where = [row.where] if processes > 1 else []
        remedy = line.remedy if line.level != "ok" else ""
        cells.append([line.check, line.level, line.found, *where, remedy])
    columns = ["check", "", "found", *(["worst rank"] if processes > 1 else []), "remedy"]
    bold = {(place, 1) for place, cell in enumerate(cells) if cell[1] != "ok"}
    return Table(columns, cells, bold=bold)


def verdict(found: Sequence[Row]) -> str:
    """The last line."""
    counts = {level: sum(row.line.level == level for row in found) for level in LEVELS}
    return ", ".join(
        f"{number} {level}{'s' if number != 1 and level != 'ok' else ''}"
        for level, number in counts.items()
    )


def code(found: Iterable[Row]) -> int:
    """That of the first failure."""
    return next((row.line.code for row in found if row.line.level == "failure"), FINISHED)
