"""The fake recipe in place of the real one, and `openqwen` called in this process."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import openqwen.recipe
from openqwen import cli

FAKE = Path(__file__).with_name("fake_recipe.py")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The fake recipe's module, installed as openqwen.recipe.stages."""
    spec = importlib.util.spec_from_file_location("fake_recipe", FAKE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "openqwen.recipe.stages", module)
    monkeypatch.setattr(openqwen.recipe, "stages", module, raising=False)
    return module


class CommandLine:
    """`call("run", "tiny.yaml")` returns the exit status; `out` and `err` hold what was printed, `ran` which stages."""

    def __init__(self, capsys: pytest.CaptureFixture, log: Path):
        self._capsys, self._log = capsys, log
        self.out = self.err = ""
        self.ran: list[str] = []

    def __call__(self, *arguments: str) -> int:
        self._log.write_text("")
        self._capsys.readouterr()
        try:
            status = cli.main(arguments)
        except SystemExit as stop:
            status = stop.code
        self.out, self.err = self._capsys.readouterr()
        self.ran = self._log.read_text().split()
        return status


@pytest.fixture
def call(fake, tmp_path, monkeypatch, capsys) -> CommandLine:
    """The command line with the fake recipe, in an empty current folder that holds tiny.yaml."""
    log = tmp_path / "log"
    monkeypatch.setenv("FAKE_LOG", str(log))
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "tiny.yaml").write_text("seed: 1\nlearn:\n  train:\n    learning_rate: 1e-3\n")
    return CommandLine(capsys, log)
