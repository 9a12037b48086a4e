"""timm and DeepSpeed are imported without trackers, which can be imported afterwards."""

import gc
import importlib
import sys
from pathlib import Path

import pytest

import trainer.prepare.libraries as libraries


def test_trackers_are_not_found_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("timm", "mlflow"):
        monkeypatch.setitem(sys.modules, name, sys)  # so that both are as before in the end
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "mlflow.py").touch()
    (tmp_path / "timm.py").write_text("try:\n import mlflow\nexcept ImportError:\n alone = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.reload(libraries)
    assert sys.modules["timm"].alone
    assert importlib.import_module("mlflow").__file__ == str(tmp_path / "mlflow.py")


@pytest.mark.parametrize("found", [True, False])
def test_garbage_is_not_looked_for_meanwhile(
    found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", sys)
    monkeypatch.delitem(sys.modules, "timm")
    (tmp_path / "timm.py").write_text("import gc\nlooked = gc.isenabled()\nmade = [gc]\n")
    monkeypatch.syspath_prepend(tmp_path)
    (gc.enable if found else gc.disable)()
    try:
        importlib.reload(libraries)
        assert gc.isenabled() == found
    finally:
        gc.enable()
    assert not sys.modules["timm"].looked
    made = sys.modules["timm"].made
    assert not any(made is one for one in gc.get_objects()), "no later collection looks at it"
