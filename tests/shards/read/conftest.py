import pytest


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that fails is asked again at once."""
    monkeypatch.setattr("shards.read.retry.PAUSE", 0)
