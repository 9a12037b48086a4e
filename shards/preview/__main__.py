"""The command line of the preview.

Writes `sheet.png` (classes x domains), `index.html` (that, with counts, sizes, formats and images
that look alike; it needs no other file) and `look_alikes.csv`.
"""

import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from shards.command_line import EXIT_CODES, Parser, path, run_command
from shards.config import MAX_PIXELS, DataConfig
from shards.durable import replaced_when_whole
from shards.embedded.digits import embedded_shards
from shards.errors import DataConfigError, OutputError
from shards.preview.contents import Contents
from shards.preview.page import listed, page
from shards.preview.sheet import contact_sheet
from shards.read.index import ShardIndex
from shards.write.conversion import check_at_least_one
from shards.write.survey import counts_table
from shards.write.worker_pool import default_jobs

log = logging.getLogger("shards.preview")


def parser() -> Parser:
    """Describe the command line."""
    result = Parser(
        prog="python -m shards.preview",
        description="Show what a shard set holds: a contact sheet, counts, sizes and formats, and "
        "images that look alike. Writes sheet.png, index.html and look_alikes.csv.",
        epilog=f"{EXIT_CODES}, 130 interrupted.",
        allow_abbrev=False,
    )
    add = result.add_argument
    add("--root", help="folder, URL or command of the set (default: the embedded data)")
    add("--out", type=path, default=Path("preview"), help="folder to write (default: %(default)s)")
    add("--trial_seed", type=int, default=0, metavar="N",
        help="trial whose split look-alikes are compared with (default: %(default)s)")  # fmt: skip
    add("--quick", action="store_true", help="read only the images of the sheet")
    add("--jobs", type=int, default=default_jobs(), metavar="N",
        help="processes (default: the usable CPU cores)")  # fmt: skip
    add("--max_pixels", type=int, default=MAX_PIXELS, metavar="N",
        help="images with more are not decoded (default: %(default)s)")  # fmt: skip
    add("--cache_dir", help="folder for shards of a remote set, as data.cache_dir")
    add("--cache_gib", type=float, default=DataConfig.cache_gib, help="largest size of that folder "
        "in GiB (default: %(default)s)")  # fmt: skip
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, of this process unless `argv` is given; gives the exit code."""
    return run_command(lambda: _run(argv))


def _run(argv: Sequence[str] | None) -> int:
    args = parser().parse_args(argv)
    check_at_least_one(jobs=args.jobs, max_pixels=args.max_pixels)
    config = DataConfig(cache_dir=args.cache_dir, cache_gib=args.cache_gib)
    if problems := config.problems():
        raise DataConfigError(problems[0])
    index = ShardIndex.load(embedded_shards() if args.root is None else args.root, config)
    _write(args.out, {})  # before the work
    contents = Contents(index, args.trial_seed, args.max_pixels)
    if not args.quick:
        contents.look(args.jobs)
    sheet = contact_sheet(contents)
    html = page(contents, sheet).encode()
    _write(args.out, {"sheet.png": sheet, "look_alikes.csv": listed(contents), "index.html": html})
    log.info("%s", counts_table(index, contents.counts))
    for note in contents.notes:
        log.warning("%s", note)
    log.info(
        "%s: %s; open %s", index.name, contents.summary(), shlex.quote(f"{args.out}/index.html")
    )
    return 0


def _write(folder: Path, files: dict[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with replaced_when_whole(folder / name) as stream:
                stream.write(content)
    except OSError as error:
        raise OutputError(
            f"--out {folder}: cannot be written ({error.strerror or error}); give another folder"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
