"""Which of timm's models take adapters: each is built on the meta device and tried."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import timm
import torch
from torch import nn

import moa
from moa.layers.layer import moa_layers
from trainer.prepare.footprint import blank_images

PAGE = """# Backbones

Made from the code by `make backbones`: all {number} models of timm {version}, each built without
weights and given adapters. `linear` and `full` need no more than a classifier. Adapters go to
linear layers under `blocks.N`; the table says how many of a family's models have them where the
methods look by default (`attn.qkv`), and what may be named in `--moa.targets` where they have not.
What does not fit is refused before weights are fetched, with the layers that would.

The smallest of each family was also run: all its adapters are used in its forward. BatchNorm and
other running statistics keep the pretrained values, in training, too. Distilled models (DeiT, PiT,
LeViT) have two classifiers: both train, and timm averages their scores. Where timm's own defaults
have drop path or dropout (Swin, TinyViT, relative positions), it acts in training as timm sets it,
and is drawn by each process for itself, so that the number of processes then changes the result.

| family | models | with adapters by default | the smallest of these | other targets, not run |
|---|---|---|---|---|
{rows}

The other families have no linear layers under `blocks.N`, so that `linear` and `full` are all there
is: {others}.

No classifier, and so no use here: {headless}.
"""


@dataclass(frozen=True)
class Found:
    """What became of one model.

    Attributes:
        parameters: how many numbers it has.
        head: whether it has a classifier.
        adapted: layers that `lora` wraps by default.
        others: what could be named instead, where there are none.
    """

    name: str
    family: str
    parameters: int
    head: bool
    adapted: int
    others: str = ""


def families() -> dict[str, list[str]]:
    """The models of each of timm's families, which are its modules."""
    found: dict[str, list[str]] = {}
    for name in timm.list_models():
        package, _, family = timm.model_entrypoint(name).__module__.rpartition(".")
        if package == "timm.models":
            found.setdefault(family, []).append(name)
    return found


def tried(name: str, family: str) -> tuple[Found, nn.Module]:
    """Builds a model on the meta device and gives it adapters, if they fit."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7)
        size = sum(parameter.numel() for parameter in model.parameters())
        head, adapted, others = True, 0, ""
        try:
            moa.inject(model, moa.MoAConfig(method="linear"))
            adapted = len(moa.inject(model, moa.MoAConfig(method="lora")).layers)
        except moa.NoMatchingModuleError as error:
            others = str(error).partition("would match: ")[2]
        except moa.MoAConfigError:
            head = False
    return Found(name, family, size, head, adapted, others), model


def unused_adapters(model: nn.Module) -> list[str]:
    """Adapted layers that a forward passes by, as where a model reads their weights itself."""
    unused = {path for path, _ in moa_layers(model)}
    with ExitStack() as hooks:
        for path, layer in moa_layers(model):
            note = layer.register_forward_hook(lambda *_, path=path: unused.discard(path))
            hooks.enter_context(note)
        model(blank_images(model, 1))
    return sorted(unused)


def backbones_page() -> str:
    """The page of the docs; takes some minutes."""
    names = families()
    found = [tried(name, family)[0] for family, all_of in names.items() for name in all_of]
    with_blocks = {each.family for each in found if each.adapted or each.others}
    without = sorted(set(names) - with_blocks)
    rows = (
        _row(family, [f for f in found if f.family == family]) for family in sorted(with_blocks)
    )
    return PAGE.format(
        number=len(found), version=timm.__version__, rows="\n".join(rows),
        others=", ".join(f"`{name}` ({len(names[name])})" for name in without),
        headless=", ".join(f"`{each.name}`" for each in found if not each.head) or "none",
    )  # fmt: skip


def _row(family: str, found: list[Found]) -> str:
    fitting = sorted((f for f in found if f.adapted), key=lambda each: each.parameters)
    small = ""
    if fitting:
        small = f"`{fitting[0].name}`"
        if unused := unused_adapters(tried(fitting[0].name, family)[1]):
            small += f", but {unused[0]} is not used"
    words = dict.fromkeys(_targets([f.others for f in found if f.others and not f.adapted]))
    others = ", ".join(f"`{word}`" for word in [*words][:4])
    return f"| `{family}` | {len(found)} | {len(fitting)} | {small} | {others} |"


def _targets(others: list[str]) -> Iterator[str]:
    """Layers of attention if there are any, else all, as one would name them."""
    every = [word for text in others for word in text.split(", ")]
    return iter([word for word in every if "qkv" in word or "attn" in word] or every)
