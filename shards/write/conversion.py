"""Images to shard sets, resumable at any moment.

Images are stored byte for byte, shuffled once with a fixed seed so that reading a shard from front
to back already mixes the classes. Every file gets its final name only when complete; a shard that
has it is not written again when an interrupted conversion continues. `index.json` comes last: a
folder without it is an unfinished conversion. The same images always give the same bytes.
"""

import contextlib
import functools
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import filelock
import numpy as np

from shards.datasets import DatasetSpec
from shards.durable import PARTIAL, replaced_when_whole
from shards.errors import DataConfigError, OutputError
from shards.read import layout
from shards.read.index import ShardIndex
from shards.write.exclusion import check_sizes, report_exclusion, report_leftovers
from shards.write.groups import find_groups
from shards.write.image_folder import dataset_folder, list_images
from shards.write.listing import STAGED_NAME, Source, list_source, report_passed_over
from shards.write.progress import progress
from shards.write.set_name import check_name, name_set, write_json
from shards.write.shard_file import PackedShard, pack_shard
from shards.write.shard_plan import STATE_NAME, ShardPlan, ShardTask, make_plan
from shards.write.worker_pool import run_tasks

log = logging.getLogger(__name__)

DEFAULT_SHARD_SIZE = 1000
DEFAULT_SHARD_BYTES = 512 * 2**20
LOCK_NAME = ".writer.lock"


def write_shards(
    root: Path,
    out: Path,
    spec: DatasetSpec,
    *,
    exclude: Collection[str] = (),
    shard_size: int = DEFAULT_SHARD_SIZE,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    jobs: int = 1,
    name: str | None = None,
    source: Source | None = None,
    group_by: str | None = None,
) -> ShardIndex:
    """Convert images to a shard set, unless that has been done already, and open it.

    Args:
        root: folder `<domain>/<class>/**/<image>`, or that of `source`.
        out: folder of the shard set, made if needed. What an interrupted conversion of the same
            images left there is used.
        spec: the dataset.
        exclude: paths relative to `root` to leave out.
        shard_size: largest number of samples of one shard.
        shard_bytes: bytes that a shard of more than one sample should not exceed.
        jobs: number of processes; changes speed, never a byte.
        name: what tables and cards shall call the set, as of `name_set`.
        source: where the images come from, unless `root` is an image folder.
        group_by: pattern that names groups in paths, as of `find_groups`; the split keeps them.

    Raises:
        DataConfigError: the images or the settings do not fit.
        DamagedDataError: an image cannot be read, or `out` holds a damaged copy of this set.
        OutputError: `out` cannot be written, is too small, is in use, or holds something else.
    """
    check_name(name, spec.name)
    plan = plan_shards(
        root, out, spec, exclude=exclude, shard_size=shard_size, shard_bytes=shard_bytes,
        jobs=jobs, source=source, group_by=group_by,
    )  # fmt: skip
    write_planned(out, plan, jobs)
    if name is not None:
        name_set(out, name)
    return ShardIndex.load(out)


def plan_shards(
    root: Path,
    out: Path,
    spec: DatasetSpec,
    *,
    exclude: Collection[str] = (),
    shard_size: int = DEFAULT_SHARD_SIZE,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    jobs: int = 1,
    source: Source | None = None,
    group_by: str | None = None,
    only: Collection[str] = (),
    before: Sequence[str] | None = None,
) -> ShardPlan:
    """Decide what `write_shards` will write, and say what is odd about the images.

    Of all domains, or `only` of some, to extend the set whose domains' prefixes are `before`.
    """
    check_at_least_one(shard_size=shard_size, shard_bytes=shard_bytes, jobs=jobs)
    if out.resolve().is_relative_to(dataset_folder(root, spec).resolve()):
        raise DataConfigError(f"--out {out}: must not lie inside --root {root}")
    if source:
        listing = list_source(source, spec, exclude, only)
    else:
        listing = list_images(root, spec, exclude, only)
    report_passed_over(listing)
    report_exclusion(listing, exclude)
    check_sizes(listing, spec, exclude)
    groups = find_groups(listing, group_by, extending=before is not None)
    plan = make_plan(listing, spec.name, shard_size, shard_bytes, group_by, groups, before or ())
    report_leftovers(listing)
    return plan


def write_planned(out: Path, plan: ShardPlan, jobs: int) -> None:
    """Write a set into its folder, unless that has been done already.

    Raises as `write_shards`.
    """
    with writing(out, "what is finished stays, the same command continues"):
        if _is_done(out, plan):
            log.info(
                "%s already holds this set (same names and sizes; move it away if images were "
                "edited)",
                out,
            )
        else:
            _write_set(out, plan, _prepare(out, plan), jobs)
        (out / STATE_NAME).unlink(missing_ok=True)


@contextlib.contextmanager
def writing(out: Path, left: str) -> Iterator[None]:
    """Within the block nobody else writes to the set in `out`.

    Raises `OutputError`: somebody does, or it cannot be written; `left` says what is there then.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(out / LOCK_NAME, timeout=0):
            yield
    except filelock.Timeout as error:
        raise OutputError(f"--out {out}: another writer is at work there") from error
    except OSError as error:
        raise OutputError(
            f"--out {out}: cannot be written ({error.strerror or error}); {left}"
        ) from error


def check_at_least_one(**settings: int) -> None:
    """Raise on the number of a flag that is below 1, before anything is listed."""
    for name, value in settings.items():
        if value < 1:
            raise DataConfigError(f"--{name} {value}: must be 1 or more")


def _is_done(out: Path, plan: ShardPlan) -> bool:
    """Tell whether `out` holds this set already, by names and sizes; refuse any other set."""
    try:
        found = json.loads((out / layout.INDEX_NAME).read_bytes()).get("source_sha256")
    except FileNotFoundError:
        return False
    except (ValueError, AttributeError):
        found = None
    if found != plan.source_sha256:
        raise OutputError(
            f"--out {out}: holds another shard set; give an empty folder, or move this one away"
        )
    return True


def _prepare(out: Path, plan: ShardPlan) -> list[ShardTask]:
    """Keep what an interrupted run of the same plan finished, delete its other left-overs.

    The state file names the plan in its first line and a finished shard with its hash in each other
    line. A folder that holds anything foreign is refused.
    """
    names = [name for name in sorted(os.listdir(out)) if name != LOCK_NAME]
    started = STATE_NAME in names
    for name in names:
        if not plan.writes(name) or not (started or name.endswith(PARTIAL)):
            raise OutputError(f"--out {out}: not empty, it holds {name!r}; give an empty folder")
    lines = (out / STATE_NAME).read_text(errors="replace").split("\n") if started else [""]
    same = lines[0] == plan.state_sha256
    whole_lines = lines[1:-1] if same else []  # what follows the last newline was cut short
    recorded = dict(line.split(" ") for line in whole_lines if line.count(" ") == 1)
    there = {task.file for task in plan.tasks} & set(names)
    kept = {name: sha256 for name, sha256 in recorded.items() if name in there}
    for name in names:
        if name != STATE_NAME and name not in kept:
            (out / name).unlink()
    if same:
        log.info("continuing: %d of %d shards are there", len(kept), len(plan.tasks))
    elif started:
        log.info("images or settings changed since the conversion was interrupted; starting afresh")
    with replaced_when_whole(out / STATE_NAME) as stream:
        records = [plan.state_sha256, *(f"{name} {sha256}" for name, sha256 in kept.items())]
        stream.write("".join(f"{line}\n" for line in records).encode())
    _check_space(out, plan)
    return [replace(task, sha256=kept.get(task.file)) for task in plan.tasks]


def _check_space(out: Path, plan: ShardPlan) -> None:
    """Raise unless the file system has room for what is still to be written."""
    there = [out / task.file for task in plan.tasks if (out / task.file).exists()]
    needed = plan.num_bytes() - sum(path.stat().st_size for path in there)
    free = shutil.disk_usage(out).free
    if needed > free:
        raise OutputError(
            f"--out {out}: {needed} bytes ({needed / 2**30:.1f} GiB) needed, {free} bytes "
            f"({free / 2**30:.1f} GiB) free on its file system; free some space or give another "
            "folder"
        )


@contextlib.contextmanager
def _staged(out: Path, plan: ShardPlan) -> Iterator[None]:
    """Keep the images of a source that cannot be read one by one in a file of their own."""
    if plan.listing.stage is None:
        yield
        return
    try:
        with replaced_when_whole(out / STAGED_NAME) as stream:
            plan.listing.stage(stream)
        yield
    finally:
        (out / STAGED_NAME).unlink(missing_ok=True)


def _write_set(out: Path, plan: ShardPlan, tasks: Sequence[ShardTask], jobs: int) -> None:
    """Write all shards, then what describes them; the index comes last."""
    packed: dict[int, PackedShard] = {}
    total = sum(len(task.places) for task in tasks)
    with (
        _staged(out, plan),
        progress("writing", total) as advance,
        (out / STATE_NAME).open("a") as state,
    ):
        pack = functools.partial(pack_shard, out=out)
        for number, shard in run_tasks(pack, tasks, min(jobs, len(tasks))):
            packed[number] = shard
            if tasks[number].sha256 != shard.info.sha256:
                state.write(f"{shard.info.file} {shard.info.sha256}\n")
                state.flush()
            advance(shard.info.samples)
    shards = [packed[number] for number in range(len(tasks))]
    for shard in shards:
        for note in shard.notes:
            log.warning("%s", note)
    domains = [_write_table(out, plan, domain, shards) for domain in range(len(plan.stems))]
    infos = [shard.info for shard in shards]
    write_json(out / layout.INFO_NAME, layout.stock_info(domains, infos))
    sections = {
        "dataset": plan.dataset,
        "classes": list(plan.listing.classes),
        "domains": [asdict(info) for info in domains],
        "shards": [asdict(info) for info in infos],
        **({} if plan.group_by is None else {"group_by": plan.group_by}),
    }
    write_json(
        out / layout.INDEX_NAME,
        {
            "format_version": layout.FORMAT_VERSION,
            "source_sha256": plan.source_sha256,
            "digests": {name: layout.section_digest(value) for name, value in sections.items()},
            **sections,
        },
    )


def _write_table(
    out: Path, plan: ShardPlan, domain: int, shards: Sequence[PackedShard]
) -> layout.DomainInfo:
    """Write the sample table of one domain."""
    listed = plan.listing.domains[domain]
    dtype = layout.GROUPED_DTYPE if plan.groups else layout.TABLE_DTYPE
    table = np.zeros(len(listed.paths), dtype=dtype)
    if plan.groups:
        table["group"] = plan.groups[domain]
    table["rank"] = np.arange(len(table))
    table["label"] = listed.labels
    for number, (task, shard) in enumerate(zip(plan.tasks, shards, strict=True)):
        if task.domain_name == listed.name:
            table["shard"][task.places] = number
            for column in ("offset", "size", "crc32"):
                table[column][task.places] = shard.rows[column]
    path = out / f"{plan.stems[domain]}.npy"
    with replaced_when_whole(path) as stream:
        np.save(stream, table)
    return layout.DomainInfo(
        name=listed.name, key_prefix=plan.prefixes[domain], table=path.name, samples=len(table),
        sha256=layout.file_sha256(path),
    )  # fmt: skip
