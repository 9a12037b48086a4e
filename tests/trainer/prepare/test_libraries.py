"""timm and DeepSpeed are imported without trackers, which can be imported afterwards."""

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
