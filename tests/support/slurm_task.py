"""What a job runs instead of Python where SLURM is tried and not training: a run without steps.

Holds the run folder `RUN` and waits for a signal, as a run does; the start after `STOPS` of them is
one that finishes. With `DEAF` it has not come as far as to listen.
"""

import os
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from trainer.checkpoint.folder_lock import FolderLock  # noqa: E402  (needs the repaired path)
from trainer.process.ending import conclude  # noqa: E402
from trainer.process.slurm import watch_job  # noqa: E402
from trainer.process.stopping import Stopped, Stopping  # noqa: E402
from trainer.process.world import world_from_environment  # noqa: E402


def run(folder: Path, stopping: Stopping) -> None:
    stopping.hear()
    FolderLock(folder).acquire()
    starts = len(list(folder.glob("start-*")))
    (folder / f"start-{starts}").touch()
    if starts == int(os.environ["STOPS"]):
        (folder / "done").touch()
        return
    stopping.begin(list)
    while not stopping.reason:
        stopping.agree_on_signals()
        time.sleep(0.05)
    raise Stopped(f"stopped by {stopping.reason}")


def main() -> int:
    folder = Path(os.environ["RUN"])
    folder.mkdir(parents=True, exist_ok=True)
    if "trainer.plan" in sys.argv:
        sys.stdout.write(f"run folder: {folder}\n")
        return 0
    if "DEAF" in os.environ:
        (folder / f"deaf-{os.environ.get('SLURM_RESTART_COUNT', 0)}").touch()
        time.sleep(600)
    stopping = Stopping(is_main=True)
    stopping.listen()
    watch_job(os.environ)
    return conclude(lambda: run(folder, stopping), world_from_environment(), stopping)


if __name__ == "__main__":
    sys.exit(main())
