"""What holds for every test: none is told by the tests that ran before it in the same process."""

import logging
import os
from collections.abc import Iterator

import pytest

LOGGERS = ("trainer", "shards", "moa")


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
