"""The page of timm's families: none is missing, and the models that it names are what it says."""

import re

import pytest

from tests.support.docs_blocks import ROOT
from trainer.prepare.families import families, tried, unused_adapters

PAGE = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8")
ROWS = {
    row[0]: row[1:]
    for row in re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (.*) \| .*\|$", PAGE, re.M)
}
OTHERS = dict(re.findall(r"`(\w+)` \((\d+)\)", PAGE))
SMALL = {family: row[2].strip("`") for family, row in ROWS.items() if row[1] != "0"}


def test_every_family_and_model_is_on_the_page() -> None:
    sizes = {family: str(len(names)) for family, names in families().items()}
    assert {family: row[0] for family, row in ROWS.items()} | OTHERS == sizes, (
        "run `make backbones`"
    )
    assert len(SMALL) >= 20


@pytest.mark.parametrize("family", [*sorted(SMALL)[::5], "vision_transformer", "xcit"])
def test_the_model_named_uses_its_adapters(family: str) -> None:
    found, model = tried(SMALL[family], family)
    assert found.head
    assert found.adapted > 0
    assert unused_adapters(model) == []


@pytest.mark.parametrize("family", [*sorted(OTHERS)[::12], "pvt_v2"])
def test_a_family_without_default_adapters_has_none(family: str) -> None:
    found, _ = tried(families()[family][0], family)
    assert found.head
    assert found.adapted == 0
    assert bool(found.others) == (family in ROWS)


def test_adapters_that_a_model_passes_by_are_found() -> None:
    _, model = tried("test_vit", "vision_transformer")
    model.blocks[1].attn.forward = lambda x, **_: x  # type: ignore[index, union-attr, assignment]
    assert unused_adapters(model) == ["blocks.1.attn.proj", "blocks.1.attn.qkv"]
