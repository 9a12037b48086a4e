"""`trainer/run.py`, killed with its children once a step is on record: STEP and its arguments.

From within, since a watcher on a busy machine may look again only after the run has ended.
"""

import os
import runpy
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.support.warm import ROOT
from trainer.checkpoint.run_folder import RunFolder


def main() -> None:
    step = int(sys.argv.pop(1))
    append = RunFolder.append

    def append_and_die(self: RunFolder, path: Path, row: Mapping[str, Any]) -> None:
        append(self, path, row)
        if path == self.metrics and row["step"] == step:
            os.killpg(0, signal.SIGKILL)

    RunFolder.append = append_and_die  # type: ignore[method-assign]
    runpy.run_path(str(ROOT / "trainer" / "run.py"), run_name="__main__")


if __name__ == "__main__":
    main()
