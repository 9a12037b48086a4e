"""Further domains for a finished set, whose own files stay as they are and whole at any moment.

The new domains are written as a set of their own in a hidden folder of the old one, to be continued
like any conversion. Then their shards move over, and last an index that names all of them takes the
place of the old one. They follow the old domains, whose numbers and splits do not change.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from shards.datasets import DatasetSpec, nearest
from shards.durable import replaced_when_whole
from shards.errors import DataConfigError, OutputError
from shards.read import layout
from shards.read.checking import IndexContent, parse_index
from shards.read.index import ShardIndex
from shards.write.conversion import plan_shards, write_planned, writing
from shards.write.set_name import write_json
from shards.write.shard_plan import STATE_NAME, ShardPlan

log = logging.getLogger(__name__)

WORK_NAME = ".extension"


def extend_shards(
    root: Path,
    out: Path,
    spec: DatasetSpec,
    domains: Collection[str],
    *,
    group_by: str | None = None,
    jobs: int = 1,
    **options: Any,
) -> ShardIndex:
    """Add some of the domains of `root` to the set in `out`, unless that has been done already.

    Arguments and errors are those of `write_shards`. Besides, `DataConfigError`: there is no set,
    or one whose domains are fixed, that has a domain of these names, other classes or other groups.
    """
    _check_set(ShardIndex.load(out), out, spec, group_by)
    with writing(out, "the set is as it was, the same command continues"):
        index = ShardIndex.load(out)  # nobody changes it from now on
        content = json.loads((out / layout.INDEX_NAME).read_bytes())
        plan = plan_shards(
            root, out, spec, only=domains, group_by=index.group_by, jobs=jobs,
            before=[info.key_prefix for info in index.domain_infos], **options,
        )  # fmt: skip
        if plan.source_sha256 in _extended(content):
            log.info("%s already holds these domains", out)
        else:
            _check_domains(index, plan, out)
            _discard_others(out / WORK_NAME, plan)
            write_planned(out / WORK_NAME, plan, jobs)
            _join(out, index, content, plan.source_sha256)
        shutil.rmtree(out / WORK_NAME, ignore_errors=True)
    return ShardIndex.load(out)


def _check_set(index: ShardIndex, out: Path, spec: DatasetSpec, group_by: str | None) -> None:
    """Raise unless a set can be extended so."""
    if spec.domains is not None or index.dataset != spec.name:
        raise DataConfigError(
            f"--extend: {out} holds {index.dataset!r}, and the domains of a known dataset are "
            "fixed; only sets of --dataset folder can be extended"
        )
    if group_by not in (None, index.group_by):
        raise DataConfigError(
            f"--group_by {group_by!r:.200}: the set in {out} has {index.group_by!r:.200}, which "
            "its new domains get too; leave the flag out"
        )


def _check_domains(index: ShardIndex, plan: ShardPlan, out: Path) -> None:
    """Raise unless the new domains fit the set and nothing of theirs is in the way."""
    for domain in plan.listing.domains:
        if domain.name in index.domains:
            raise DataConfigError(
                f"--extend {domain.name!r}: the set in {out} has this domain already; it has "
                f"{', '.join(index.domains)}"
            )
    new = plan.listing.classes
    extra = [name for name in new if name not in index.classes]
    lacking = [name for name in index.classes if name not in new]
    if extra or lacking:
        what, name, others = (
            ("has the extra class", extra[0], index.classes)
            if extra
            else ("lacks the class", lacking[0], new)
        )
        raise DataConfigError(
            f"--extend: {plan.listing.domains[0].name!r} {what} {name!r} compared with the set in "
            f"{out}{nearest(name, list(others))}; all domains need the same classes"
        )
    if not (out / WORK_NAME / layout.INDEX_NAME).exists():
        files = [task.file for task in plan.tasks] + [f"{stem}.npy" for stem in plan.stems]
        if there := [name for name in files if (out / name).exists()]:
            raise OutputError(f"--out {out}: holds {there[0]!r} already; move it away")


def _discard_others(work: Path, plan: ShardPlan) -> None:
    """Delete what an extension by other domains, or other images, has left unfinished."""
    state = work / STATE_NAME
    begun = state.read_text(errors="replace").partition("\n")[0] if state.exists() else ""
    if begun != plan.state_sha256 and not (work / layout.INDEX_NAME).exists():
        shutil.rmtree(work, ignore_errors=True)


def _join(out: Path, old: ShardIndex, content: dict[str, Any], source_sha256: str) -> None:
    """Move the new domains' files to those of the set, and describe them in its index."""
    work = out / WORK_NAME
    new = parse_index(work / layout.INDEX_NAME, (work / layout.INDEX_NAME).read_bytes())
    for shard in new.shards:
        if (work / shard.file).exists():  # it was not before a crash
            (work / shard.file).replace(out / shard.file)
    domains = [_joined_table(out, place, new, len(old.shards)) for place in range(len(new.domains))]
    every, shards = (*old.domain_infos, *domains), (*old.shards, *new.shards)
    write_json(out / layout.INFO_NAME, layout.stock_info(every, shards))
    before = content.get("source_sha256")
    content |= {
        "source_sha256": hashlib.sha256(f"{before}\n{source_sha256}".encode()).hexdigest(),
        "extended": [*_extended(content), source_sha256],
        "domains": [asdict(info) for info in every],
        "shards": [asdict(info) for info in shards],
    }
    digests = content.get("digests", {})
    content["digests"] = {name: layout.section_digest(content.get(name)) for name in digests}
    write_json(out / layout.INDEX_NAME, content)


def _extended(content: dict[str, Any]) -> list[object]:
    """What was added before, by its hash."""
    found = content.get("extended")
    return found if isinstance(found, list) else []


def _joined_table(out: Path, place: int, new: IndexContent, first: int) -> layout.DomainInfo:
    """Write a new domain's table for shards that are numbered from `first`."""
    info = new.domains[place]
    table = np.load(out / WORK_NAME / info.table)
    table["shard"] += first
    with replaced_when_whole(out / info.table) as stream:
        np.save(stream, table)
    return replace(info, sha256=layout.file_sha256(out / info.table))
