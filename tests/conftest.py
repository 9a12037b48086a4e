"""What holds for every test: none is told by the tests that ran before it in the same process."""

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes share the cores

LOGGERS = ("trainer", "shards", "moa")
LONGEST = (
    "slurm/test_cluster.py",
    "trainer/engine/test_parity.py",
    "docs/test_commands.py",
    "trainer/process/test_stopping.py",
    "trainer/train/test_run.py",
    "trainer/train/test_killed.py",
    "trainer/engine/test_averaging.py",
    "trainer/engine/test_topologies.py",
    "trainer/train/test_eval_mode.py",
)
"""Files to begin with, so that no process is left with one of them when the others are done."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


def pytest_collection() -> None:
    """Imports make objects by the hundred thousand and little garbage: nobody looks for it."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Nobody looks for garbage among a million objects that stay: no engine, and no fork either.

    A fork would write to all of them, and so make each page its own.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def process_as_found() -> Iterator[None]:
    """Puts back what a run inside the test process leaves: a launcher's variables, log handlers."""
    environment = dict(os.environ)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    found = [(logger.handlers[:], logger.level, logger.propagate) for logger in loggers]
    yield
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)
    for logger, (handlers, level, propagate) in zip(loggers, found, strict=True):
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers[:] = handlers
        logger.setLevel(level)
        logger.propagate = propagate
