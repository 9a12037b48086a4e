import logging
import sys

import pytest

from shards.write.progress import PlainProgress, progress


def test_plain_lines_come_now_and_then_and_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    with caplog.at_level(logging.INFO):
        advance = PlainProgress("writing", 1000, clock=lambda: now[0])
        for seconds, images in ((4, 100), (5, 100), (1, 50), (2, 50), (9, 100), (1, 600)):
            now[0] += seconds
            advance(images)
    assert [record.getMessage() for record in caplog.records] == [
        "writing: 250 of 1000 images (25%), 25 images/s, 0:00:30 left",
        "writing: 400 of 1000 images (40%), 19 images/s, 0:00:32 left",
        "writing: 1000 of 1000 images (100%), 45 images/s, done",
    ]


def test_live_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with progress("verifying", 1234) as advance:
        advance(1000)
        advance(234)
    said = capsys.readouterr().err
    assert "verifying" in said
    assert "1234/1234" in said
