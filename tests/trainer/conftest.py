"""Data that a run reads in no time."""

from collections.abc import Iterator

import pytest

from shards.embedded.digits import embedded_shards
from tests.support.shards_fixtures import few_digits


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Settings for a sixth of the embedded data: what a run learns of it is not asked."""
    index = few_digits(tmp_path_factory.mktemp("few"), per_class=5)
    root = str(index.root)
    index.close()
    return {"data__root": root}


@pytest.fixture(scope="module")
def few_embedded(few: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The same in the place of the embedded data, for tests that name no other."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / embedded_shards().name).symlink_to(few["data__root"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOA_CACHE", str(cache))
        yield
