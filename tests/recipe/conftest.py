"""The fake recipe in place of the real one, and `openqwen` called in this process."""

from pathlib import Path

import pytest
from fake_recipe import GRAPH

from openqwen import cli
from openqwen.recipe import graph


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake recipe in place of the real one."""
    monkeypatch.setattr(graph, "GRAPH", GRAPH)


class CommandLine:
    """`call("run", "tiny.yaml")` returns the exit status; `out` and `err` hold what was printed,
    `ran` which stages.
    """

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
