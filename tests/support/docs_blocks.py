"""The command blocks of the documentation, and what is said about running them.

A comment right before a block decides: `<!-- needs: gpu -->` (or cluster, download, hours, browser,
install, folder ...: whatever a plain machine does not have) leaves it out; `<!-- with: FLAGS -->`
runs it with those flags added to every training command, to be done sooner. Without either it runs
as it stands.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

_BLOCK = re.compile(
    r"(?:^<!-- (?P<word>needs|with): (?P<rest>[^>]*?) -->\n)?^```bash\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of shell commands.

    Attributes:
        page: file it stands in, relative to the repository.
        line: number of its first line.
        text: the commands.
        needs: what it needs that a plain machine lacks; empty if it runs.
        extra: flags to add to training commands.
    """

    page: str
    line: int
    text: str
    needs: str = ""
    extra: str = ""

    def commands(self) -> list[list[str]]:
        """Its commands as words; continued lines joined, comments dropped, variables a one.

        Of `name=$(command)` it is the command.
        """
        joined = re.sub(r"\$\w+", "1", self.text.replace("\\\n", " "))
        joined = re.sub(r"^\w+=\$\((.*)\)$", r"\1", joined, flags=re.MULTILINE)
        found = [shlex.split(line, comments=True) for line in joined.splitlines()]
        return [words for words in found if words]

    def lines(self) -> list[str]:
        """Its commands, a line each, continued lines joined."""
        joined = self.text.replace("\\\n", " ")
        return [line for line in joined.splitlines() if shlex.split(line, comments=True)]

    def script(self) -> str:
        """Its commands with the extra flags."""
        joined = self.text.replace("\\\n", " ")
        return re.sub(
            r"^(.*trainer/run\.py[^#\n]*?) *(#.*)?$", rf"\1 {self.extra}", joined, flags=re.M
        )


def blocks(page: Path) -> list[Block]:
    """The command blocks of one page."""
    text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
    return [
        Block(
            name,
            text[: match.start("text")].count("\n") + 1,
            match["text"],
            needs=match["rest"] if match["word"] == "needs" else "",
            extra=match["rest"] if match["word"] == "with" else "",
        )
        for match in _BLOCK.finditer(text)
    ]
