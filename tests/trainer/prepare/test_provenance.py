"""Where adapters come from: the command, as a card shows it."""

import pytest

from trainer.config.run_config import ROOT
from trainer.prepare.provenance import shown_command


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([str(ROOT / "trainer/run.py"), "--a.b", "x y"], "python trainer/run.py --a.b 'x y'"),
        (["trainer/run.py", "--local_rank=1", "--a=1"], "python trainer/run.py --a=1"),
        (["trainer/run.py", "--local_rank", "1", "--a=1"], "python trainer/run.py --a=1"),
        (["/usr/bin/tool", "--local-rank=0"], "/usr/bin/tool"),
    ],
)
def test_command_is_shown_as_typed(argv: list[str], expected: str) -> None:
    assert shown_command(argv) == expected
