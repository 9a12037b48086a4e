"""Data that a run reads in no time."""

import pytest

from tests.support.shards_fixtures import few_digits


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Settings for a sixth of the embedded data: what a run learns of it is not asked."""
    index = few_digits(tmp_path_factory.mktemp("few"), per_class=5)
    root = str(index.root)
    index.close()
    return {"data__root": root}
