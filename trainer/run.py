"""Entry point: `deepspeed trainer/run.py --ds_config ds_configs/zero2.json [--section.field X]`.

Started by path, Python puts `trainer/` first on the import path; the repository belongs there.
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":  # a warning that comes before somebody listens is kept until then
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from trainer.process.ending import leave  # noqa: E402  (needs the repaired path)
from trainer.train.session import main  # noqa: E402

if __name__ == "__main__":
    leave(main(sys.argv[1:]))
