"""The adapters that are evaluated together, and whether they belong together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moa.errors import AdapterError
from moa.files.atomic_folder import holds_current, replaced_folder
from moa.files.hub import HUB_PREFIX, adapter_folder
from moa.files.reading import AdapterInfo, read_adapter
from moa.files.saving import check_replaceable, write_adapter
from trainer.checkpoint.checkpoint import MANIFEST_FILE, verify
from trainer.config.run_config import ModelConfig
from trainer.prepare.backbone import Backbone, create_backbone
from trainer.prepare.provenance import shareable
from trainer.process.errors import ConfigError, OutputError, cannot_write

ENSEMBLE, SOUP = "ensemble", "soup"
"""Names of what is made of several adapters; none of these may bear one as its label."""


@dataclass(frozen=True)
class Member:
    """One adapter in memory.

    Attributes:
        label: a short name, different for each.
        source: where it was read from.
    """

    label: str
    source: str
    info: AdapterInfo
    tensors: dict[str, Tensor]


def read_members(sources: Sequence[str]) -> list[Member]:
    """Reads adapters from folders, checkpoints or `hf-hub:organisation/name`.

    Raises:
        ConfigError: one is given twice, is named as what is made of several, or they differ in base
            or classes.
        MissingAdapterError: there is none at a place.
        AdapterError, CheckpointError: one is damaged.
    """
    places = [s if s.startswith(HUB_PREFIX) else str(Path(s).resolve()) for s in sources]
    for place in places:
        same = " and ".join(s for s, its in zip(sources, places, strict=True) if its == place)
        if places.count(place) > 1:
            raise ConfigError(f"--adapter: {same}: one adapter, given twice; give each once")
    members = []
    for source, label in zip(sources, labels(sources), strict=True):
        if not source.startswith(HUB_PREFIX) and (Path(source) / MANIFEST_FILE).exists():
            verify(Path(source))  # a checkpoint is an adapter's folder, too
        members.append(Member(label, source, *read_adapter(adapter_folder(source))))
    for member in members:
        if absent := sorted({"input_size", "mean", "std"} - set(member.info.data_config)):
            raise AdapterError(
                f"{member.source}: its data_config has no {absent[0]}, without which its images "
                "cannot be made; save it with that of timm.data.resolve_model_data_config"
            )
    if problems := [line for m in members[1:] for line in _disagreements(m, members[0])]:
        raise ConfigError("\n".join(problems))
    return members


def labels(sources: Sequence[str]) -> list[str]:
    """Short names: what is left of the paths without the parts that all share at either end.

    `ConfigError` if one of several cannot be told from what is made of them all.
    """
    parts = [s.removeprefix(HUB_PREFIX).rstrip("/").split("/") for s in sources]
    if len(parts) == 1:
        return ["/".join(parts[0][-2:])]
    first, last = _shared(parts), _shared([part[::-1] for part in parts])
    short = ["/".join(part[first : len(part) - last]) for part in parts]
    if len(set(short) - {"", ENSEMBLE, SOUP}) == len(sources):
        return short
    if taken := sorted({ENSEMBLE, SOUP} & set(sources)):
        raise ConfigError(
            f"--adapter {taken[0]}: among several, {ENSEMBLE} and {SOUP} name what is made of "
            f"them; write ./{taken[0]}"
        )
    return list(sources)


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """How many parts are equal in all, counted from the start."""
    differs = [len(set(places)) > 1 for places in zip(*parts, strict=False)]
    return [*differs, True].index(True)


def _disagreements(member: Member, first: Member) -> Iterator[str]:
    """Why two adapters cannot share one backbone and one list of classes."""
    mine, other = member.info, first.info
    if (mine.base_model, mine.base_sha256) != (other.base_model, other.base_sha256):
        yield (
            f"--adapter: {member.source} was trained on {mine.base_model} "
            f"({mine.base_sha256[:12]}), {first.source} on {other.base_model} "
            f"({other.base_sha256[:12]}); evaluate adapters of different bases apart"
        )
    if mine.classes != other.classes:
        yield (
            f"--adapter: {member.source} {class_difference(mine.classes, other.classes)} in "
            f"{first.source}; evaluate adapters of different classes apart"
        )
    elif mine.data_config != other.data_config:
        yield (
            f"--adapter: {member.source} wants images as {dict(mine.data_config)}, "
            f"{first.source} as {dict(other.data_config)}; evaluate them apart"
        )


def class_difference(mine: Sequence[str], other: Sequence[str]) -> str:
    """What to say between the names of two places whose classes differ."""
    if len(mine) != len(other):
        return f"knows {len(mine)} classes, not {len(other)} as"
    place = next(i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b)
    return f"has {mine[place]!r} as class {place}, not {other[place]!r} as"


def base_of(member: Member, weights: str | None, image_size: int | None = None) -> Backbone:
    """A fresh backbone with the weights that an adapter was trained on, on the CPU.

    `weights` is `pretrained`, `random` for those that its seed draws, or a safetensors file; None
    stands for what it has on record, else `pretrained`. With an `image_size` it is made for other
    images than the adapter's, once the adapter's own has proved right. `ConfigError` if the weights
    cannot be had, or are others than those.
    """
    info = member.info
    seed, recorded = (0, "") if info.origin is None else (info.origin.seed, info.origin.weights)
    named = weights or recorded or "pretrained"
    if weights is None and named not in ("pretrained", "random") and not Path(named).is_file():
        raise ConfigError(
            f"--model.weights: {member.source} was trained on {named}, which is not here; give "
            "that file: --model.weights FILE.safetensors"
        )
    base = ModelConfig(backbone=info.base_model, weights=named, **_sizes(info))
    backbone = create_backbone(base, len(info.classes), seed)  # random ones follow from both
    if backbone.sha256 != info.base_sha256:
        raise ConfigError(
            f"--model.weights {named}: these weights of {backbone.name} have SHA-256 "
            f"{backbone.sha256[:12]}, {member.source} was trained on {info.base_sha256[:12]}; "
            f"{_right_weights(named, recorded)}"
        )
    if image_size in (None, info.data_config["input_size"][-1]):
        return backbone
    return create_backbone(replace(base, image_size=image_size), len(info.classes), seed)


def of_size(member: Member, image_size: int | None) -> Member:
    """The adapter as if it had been trained on images of another size."""
    if image_size is None:
        return member
    data_config = {**member.info.data_config, "input_size": [3, image_size, image_size]}
    return replace(member, info=replace(member.info, data_config=data_config))


def _sizes(info: AdapterInfo) -> dict[str, Any]:
    """Settings of the sizes that an adapter was trained with."""
    told = info.model_args
    size = info.data_config["input_size"][-1]
    return {
        "image_size": told.get("img_size", size if "dynamic_img_size" in told else None),
        "patch_size": told.get("patch_size"),
        "dynamic_size": told.get("dynamic_img_size", False),
    }


def _right_weights(given: str, recorded: str) -> str:
    """What to give instead of weights that an adapter was not trained on."""
    if recorded != "random":
        file = "" if recorded in ("", "pretrained") else f" ({recorded})"
        return f"give the file it was trained on{file}: --model.weights FILE.safetensors"
    if given != "random":
        return "its own were drawn at random: leave --model.weights out"
    return (
        "other versions of torch or timm draw others; use those of its run, which its folder's "
        "environment.json names"
    )


def not_trained_on(members: Sequence[Member], domain: str) -> list[Member]:
    """The adapters that held a domain out, or were trained before there was one of this name."""
    origins = ((member, member.info.origin) for member in members)
    return [
        member
        for member, origin in origins
        if origin and (domain in origin.withheld or domain not in origin.domains)
    ]


def check_target(flag: str, folder: Path) -> None:
    """Raises `OutputError` if `folder` holds something that is no adapter and would be replaced."""
    try:
        check_replaceable(folder)
    except FileExistsError as error:
        raise OutputError(f"{flag}: {error}") from error
    if holds_current(folder):
        raise OutputError(
            f"{flag}: {folder} is the current folder, or holds it, and cannot be replaced; give "
            "another folder"
        )


def write_member(flag: str, member: Member, folder: Path) -> None:
    """Writes configuration, tensors and a fresh card; nothing else of a checkpoint comes along.

    `OutputError` if that cannot be, on account of `flag`.
    """
    origin = member.info.origin
    info = replace(member.info, origin=origin and shareable(origin))
    try:
        with replaced_folder(folder) as temporary:
            write_adapter(temporary, member.tensors, info)
    except OSError as error:
        raise cannot_write(flag, folder, error) from error
