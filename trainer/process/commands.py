"""The console commands of an installation: each is a module of this package, run as `python -m`.

`python -m trainer.evaluate` and `moa-evaluate` are the same; `moa-train` is `trainer/run.py`, which
launchers start as `torchrun --no-python moa-train` or `srun moa-train`.
"""

import runpy
from functools import partial

_start = partial(runpy.run_module, run_name="__main__", alter_sys=True)

train = partial(_start, "trainer.run")
evaluate = partial(_start, "trainer.evaluate")
predict = partial(_start, "trainer.predict")
report = partial(_start, "trainer.report")
plan = partial(_start, "trainer.plan")
sweep = partial(_start, "trainer.sweep")
doctor = partial(_start, "trainer.doctor")
export = partial(_start, "trainer.export")
shards = partial(_start, "shards.writer")
preview = partial(_start, "shards.preview")
