"""What of an address may be written down: names and paths, nothing that gives access."""

import re

import pytest

from shards.addresses import lacks_secrets, without_secrets
from shards.config import DataConfig

SECRET = "S3CR:T/42"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("https://me:S@host/set?sig=S&x=1", "https://host/set?..."),
        ("https://host/set#S", "https://host/set#..."),
        ("--data.root=https://host/set?a='S'", "--data.root=https://host/set?..."),
        ("--data.root=pipe:TOKEN=S cat /d/{}", "--data.root=pipe:TOKEN=... cat /d/{}"),
        ("pipe:export T='S S'; curl -H $T https://h/{}",
         "pipe:export T=...; curl -H ... https://h/{}"),
        ("pipe:curl -fsS -H 'Authorization: Bearer S' 'https://u:S@h/{}?t=S' | zstd -dc",
         "pipe:curl -fsS -H ... https://h/{}?... | zstd -dc"),
        ("pipe:curl -HX-Auth:S --header=A:S --user S -b c=S https://h/{}",
         "pipe:curl -... --header=... --user ... -b c=... https://h/{}"),
        ("pipe:curl -d '{\"token\": \"S\"}' https://h/{}#S", "pipe:curl -d ... https://h/{}#..."),
        ("pipe:cat /d/{} #-H 'Authorization: Bearer S'", "pipe:cat /d/{} #..."),
        ("pipe:sh -c \"curl -u S https://h/{}\"", "pipe:sh -c ..."),
        ("pipe:scp me:S@h:/d/{} /dev/stdout", "pipe:scp ... /dev/stdout"),
        ("pipe:fetch S {} <<< S", "pipe:fetch ... {} <<< ..."),
        ("pipe:fetch {} 'S", "pipe:fetch {} #..."),
    ],
)  # fmt: skip
def test_what_gives_access_is_left_out(given: str, shown: str) -> None:
    found = without_secrets(re.sub(r"\bS\b", SECRET, given))
    assert SECRET not in found
    assert found == shown
    assert without_secrets(found) == found
    assert lacks_secrets(found)
    root = found.removeprefix("--data.root=")
    assert any("give the whole --data.root again" in p for p in DataConfig(root=root).problems())


@pytest.mark.parametrize(
    "text",
    [
        "pipe:aws s3 cp s3://bucket/set/{} -",
        "pipe:curl -fsS --netrc https://host/set/{}",
        "pipe:cat '/shards/my data'/{}",
        "pipe:cat ~/set/{} | zstd -dc",
        "s3://bucket/set",
        "hf://datasets/lab/set@v1/shards",
        "/plain/folder?x=1",
        "a photo of a {}.",
    ],
)
def test_the_rest_stays(text: str) -> None:
    assert without_secrets(text) == text
    assert not lacks_secrets(text)


def test_in_messages_the_words_around_a_url_stay() -> None:
    message = "https://u:p@host/a?key=1: HTTP status 403; see https://host/b?x=2, then"
    assert without_secrets(message) == (
        "https://host/a?...: HTTP status 403; see https://host/b?..., then"
    )
