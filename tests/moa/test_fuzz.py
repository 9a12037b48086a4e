"""Adapter folders of strangers: refused in a line of ours or read as they are, and nothing else."""

import copy
import json
import os
import random
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moa import AdapterError, base_hash, export_peft, import_peft, inject, save_adapter
from moa.files.card import model_card
from moa.files.reading import AdapterInfo, read_adapter
from moa.files.saving import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, attach, write_adapter
from moa.model.heads import fit_head
from tests.moa.test_state import ORIGIN
from tests.support.moa_fixtures import images, seal, small_config, stir, tiny_vit

DEEP: Any = []
for _ in range(500):
    DEEP = [DEEP]
HOSTILE = (
    None, True, -1, 0, 3, 10**18, 10**400, 1e308, float("nan"), float("inf"), "", "x" * 10_000,
    "../../x", "/dev/zero", "hf-hub:a/b", "\x00", "\ud800", "|`\n---\n<b>", [], {}, [[]], [0] * 999,
    [None], ["a"], {"a": 1}, DEEP,
)  # fmt: skip
STARTED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.")
WRITTEN = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "shutil.")
_events: list[str] | None = None


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _events is None:
        return
    writes = event == "open" and len(arguments) == 3 and set("wax+") & set(str(arguments[1] or ""))
    if writes or event.startswith((*STARTED, *WRITTEN)):
        _events.append(f"{event} {arguments}")


sys.addaudithook(_watch)


@contextmanager
def nothing_happens() -> Iterator[None]:
    """Within the block no program may start, nothing be connected to, and no file be changed."""
    global _events
    _events = []
    try:
        yield
        assert _events == []
    finally:
        _events = None


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with everything on record."""
    folder = tmp_path_factory.mktemp("fuzz") / "adapter"
    model, config = tiny_vit(), small_config("moa_lora", balance="bias")
    data = {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3}
    info = AdapterInfo(
        "vit_tiny.none", base_hash(model), config, ("a", "b", "c"),
        {**data, "interpolation": "bicubic"}, {"env0_out_acc": 0.5}, ORIGIN,
    )  # fmt: skip
    fit_head(model, None, {"kind": "cosine", "space": 5, "frozen": False})
    inject(model, config)
    stir(model)
    save_adapter(model, folder, info)
    return folder


def copied(original: Path, folder: Path) -> dict[str, Any]:
    """Copies an adapter; returns its configuration."""
    folder.mkdir(exist_ok=True)
    for path in original.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return json.loads((folder / CONFIG_FILE).read_text())  # type: ignore[no-any-return]


def use(folder: Path) -> AdapterInfo | None:
    """Reads, attaches and describes an adapter; None if it is refused with a line."""
    with nothing_happens():
        try:
            info, tensors = read_adapter(folder)
            model = tiny_vit()
            attach(model, info, tensors, str(folder))
        except AdapterError as error:
            check_line(error)
            return None
        with torch.no_grad():
            assert model(images(1)).shape == (1, 3)
        model_card(info).encode()
    return info


def check_line(error: AdapterError) -> None:
    assert len(str(error).splitlines()) == 1
    assert len(str(error)) < 1000


def test_no_flipped_bit_changes_what_is_read(original: Path, tmp_path: Path) -> None:
    draw, wanted = random.Random(15), read_adapter(original)
    refused = 0
    for name in (CONFIG_FILE, WEIGHTS_FILE) * 100:
        copied(original, tmp_path)
        content = bytearray((original / name).read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (tmp_path / name).write_bytes(content)
        try:
            info, tensors = read_adapter(tmp_path)
        except AdapterError:
            refused += 1
            continue
        assert info == wanted[0]  # white space, or the name under which the hashes stand
        assert all(torch.equal(tensors[n], t) for n, t in wanted[1].items())
    assert refused > 130


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything that stands in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def test_forged_configurations(original: Path, tmp_path: Path) -> None:
    """With hashes that fit, as whoever wrote it on purpose would."""
    draw, kept, used = random.Random(15), copied(original, tmp_path), 0
    del kept["sha256"]
    for path in [place for place in places(kept) if place]:
        for value in draw.sample(HOSTILE, 8 if path[0] == "moa_config" else 3):
            config = copy.deepcopy(kept)
            owner = config
            for key in path[:-1]:
                owner = owner[key]
            owner[path[-1]] = value
            seal(tmp_path, config)
            used += (info := use(tmp_path)) is not None
            if info is not None:  # what is read can be written, card and all
                write_adapter(tmp_path, read_adapter(tmp_path)[1], replace(info, results={}))
    assert used > 20


def test_forged_weights(original: Path, tmp_path: Path) -> None:
    draw, config = random.Random(15), copied(original, tmp_path)
    whole = (original / WEIGHTS_FILE).read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    for path in draw.sample([place for place in places(header) if place], 60):
        changed = copy.deepcopy(header)
        owner = changed
        for key in path[:-1]:
            owner = owner[key]
        owner[path[-1]] = draw.choice([*HOSTILE, "F64", "F8_E4M3", "F4", "BOOL", "I64", [0, 0]])
        text = json.dumps(changed).encode()
        content = struct.pack("<Q", len(text)) + text + whole[8 + length :]
        (tmp_path / WEIGHTS_FILE).write_bytes(content)
        seal(tmp_path, config)
        use(tmp_path)


def test_forged_peft_folders(tmp_path: Path) -> None:
    draw, model = random.Random(15), tiny_vit()
    inject(model, small_config("lora"))
    export_peft(model, tmp_path / "peft", "vit_tiny.none")
    kept = copied(tmp_path / "peft", tmp_path / "changed")
    for name in (*kept, "rank_pattern", "alpha_pattern", "layers_to_transform", "use_dora"):
        for value in draw.sample(HOSTILE, 2):
            changed = json.dumps({**kept, name: value})
            (tmp_path / "changed" / CONFIG_FILE).write_text(changed)
            with nothing_happens():
                try:
                    import_peft(tiny_vit(), tmp_path / "changed")
                except AdapterError as error:
                    check_line(error)


TEXTS = {
    "null": "null", "deep": "[" * 100_000, "digits": '{"peft_type": ' + "9" * 6000 + "}",
    "deep object": '{"a":' * 100_000, "infinity": "Infinity", "surrogate": '{"a": "\\ud800"}',
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("read", [read_adapter, lambda folder: import_peft(tiny_vit(), folder)])
def test_json_that_is_no_configuration(
    text: str, read: Callable[[Path], Any], original: Path, tmp_path: Path
) -> None:
    copied(original, tmp_path)
    (tmp_path / CONFIG_FILE).write_text(TEXTS[text])
    with pytest.raises(AdapterError, match="adapter") as caught:
        read(tmp_path)
    assert len(str(caught.value)) < 1000


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE, CARD_FILE])
@pytest.mark.parametrize("made", [os.mkfifo, lambda p: p.symlink_to("/dev/zero"), Path.mkdir])
def test_only_regular_files_are_read(
    name: str, made: Callable[[Path], Any], original: Path, tmp_path: Path
) -> None:
    copied(original, tmp_path)
    (tmp_path / name).unlink()
    made(tmp_path / name)
    if name == CARD_FILE:  # which is for people
        assert use(tmp_path) is not None
        return
    for read in (read_adapter, lambda folder: import_peft(tiny_vit(), folder)):
        with pytest.raises(AdapterError, match=rf"no {name}|{name} is no regular file"):
            read(tmp_path)


def test_a_configuration_without_end(original: Path, tmp_path: Path) -> None:
    copied(original, tmp_path)
    with (tmp_path / CONFIG_FILE).open("r+b") as file:
        file.truncate(2**40)  # takes no space
    with pytest.raises(AdapterError, match="more than 67,108,864 bytes"):
        read_adapter(tmp_path)
