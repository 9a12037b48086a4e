"""Seeded fuzz of cards and tables: a name stays a name, whatever markup it holds."""

import io
import random
import re
from collections.abc import Iterator

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console

from moa import MoAConfig, Origin
from moa.files.card import model_card
from moa.files.markdown import visible
from moa.files.reading import AdapterInfo
from trainer.process.tables import Table

PIECES = (
    *"|`*_[]()<>&\\#~!:/.-=+'\"{}%$@^,;? \n\t\0\u2028\u202e", "\r\n", "\x1b[31m",
    "\ud800", "\xff", "漢字", "🙂", "a", "Z", "07", "---", "\n---\n", "```", "\n```\n", "||", "**",
    "<script>", "</td>", "<!--", "&lt;", "https://e.org/", "www.e.org", "[a](b)", "![a](b)",
    "null", "\n# h\n", "\n\n- a\n", "{{", "!!python/object:os.system", ": ", " #", "\\|",
)  # fmt: skip


def texts(seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    while True:
        yield "".join(rng.choices(PIECES, k=rng.randint(1, 9)))


def tokens(markdown: str) -> list[Token]:
    found = MarkdownIt("commonmark").enable("table").parse(markdown)
    return [*found, *(child for token in found for child in token.children or ())]


def shown(text: str) -> str:
    return visible(" ".join(text.split()))


@pytest.mark.parametrize("seed", range(60))
def test_a_card_keeps_its_shape_and_its_header_its_values(seed: int) -> None:
    text = texts(seed)
    domains = tuple(next(text) for _ in range(3))
    origin = Origin(
        dataset=next(text), domains=domains, held_out=domains[2], trial_seed=0,
        holdout_fraction=0.2, seed=1, data_hash=next(text), split_hash=next(text),
        command=next(text), averaged=(next(text),), weights=next(text),
    )  # fmt: skip
    results: dict[str, float] = {f"env{n}_in_acc": 0.5 for n in range(3)}
    results |= {next(text): 0.25, next(text): "<b>"}  # type: ignore[dict-item]
    base = next(text)
    info = AdapterInfo(base, next(text), MoAConfig(method="lora"), ("a",), {}, results, origin)
    card = model_card(info)
    card.encode("utf-8")
    header, body = card.removeprefix("---\n").split("\n---\n", 1)
    front = yaml.safe_load(header)
    assert front["datasets"] == [origin.dataset]
    assert front["base_model"] in (base, f"timm/{base}")
    (model,) = front["model-index"]
    assert {r["dataset"]["config"] for r in model["results"]} == {origin.held_out}
    assert ModelCard(card).data.datasets == [origin.dataset]
    found = tokens(body)
    kinds = {token.type for token in found}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "bullet_list_open"}
    titles = [a.content for a, b in zip(found[1:], found, strict=False) if b.type == "heading_open"]
    assert titles[1:] == ["Results", "Training"]
    python, bash = (token for token in found if token.type == "fence")
    compile(python.content, "card", "exec")
    assert bash.content == visible(origin.command) + "\n"
    cells = [re.split(r"(?<!\\)\|", line) for line in body.splitlines() if line.startswith("| ")]
    assert [len(row) for row in cells][:5] == [4] * 5, "a title and a rule above three domains"
    assert sum(token.type == "tr_open" for token in found) == 4 + 2


@pytest.mark.parametrize("seed", range(60))
def test_a_table_keeps_its_shape_and_its_texts(seed: int) -> None:
    text = texts(1000 + seed)
    columns = [next(text) for _ in range(3)]
    rows = [[next(text) for _ in range(3)] for _ in range(2)]
    table = Table(columns, rows, next(text), bold={(0, 1)}, names=1)
    found = MarkdownIt("commonmark").enable("table").parse(table.markdown())
    inline = [token for token in found if token.type == "inline"]
    assert sum(token.type == "tr_open" for token in found) == 3
    given = [table.title, *columns, *rows[0], *rows[1]]
    for token, wanted in zip(inline, given, strict=True):
        kinds = {child.type for child in token.children or ()}
        assert kinds <= {"text", "text_special", "code_inline", "strong_open", "strong_close"}
        assert "".join(child.content for child in token.children or ()) == shown(wanted)
    lines = [line for line in table.latex("a|b}").splitlines() if line.endswith(r"\\")]
    assert [len(re.findall(r"(?<!\\)&", line)) for line in lines] == [2, 2, 2]
    printed = io.StringIO()
    table.show(Console(file=printed, width=160))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202e\ud800-\udfff]", printed.getvalue())
