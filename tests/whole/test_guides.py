"""The commands of docs/guides/ run as they are printed there, each page in a fresh folder."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from openqwen.cli import main

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "docs" / "guides"
TWO_WORDS = ("synthesize", "instructions")
# What each page makes.
RESULTS = {
    "annotation": ["data/demonstrations.jsonl", "data/preferences.jsonl"],
    "align": ["mine/sft/model.safetensors", "mine/dpo/manifest.json", "mine/scores/scores.json"],
    "pretrain": [
        "base/extended/model.safetensors",
        "base/scores/scores.json",
        "runs/mine/report.html",
    ],
    "serve": [
        "served/model.safetensors",
        "served/config.json",
        "pirate/adapter/adapter_config.json",
    ],
    "data": ["made-again/demonstrations.jsonl", "pairs/preferences.jsonl", "better/manifest.json"],
}


def script(page: Path) -> str:
    """The page's `sh` blocks; those marked `console` are alternatives and installation."""
    blocks = re.findall(r"^```sh\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    return "set -eu\n" + "".join(blocks)


def shell(text: str, folder: Path) -> str:
    """Run a script with `openqwen` and `python` in front of the path; return what it printed."""
    programs = folder / ".bin"
    programs.mkdir(exist_ok=True)
    for name, arguments in (("openqwen", " -m openqwen.cli"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable}{arguments} "$@"\n')
        (programs / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "COLUMNS": "150"}
    started = subprocess.Popen(
        ["bash", "-c", text], cwd=folder, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        printed, _ = started.communicate(timeout=2400)
    finally:  # end the servers of a page that failed
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGTERM)
    assert started.returncode == 0, printed
    return printed


def written_commands() -> dict[str, set[str]]:
    """The flags that guides, README and recipes give to each verb, by the verb's words."""
    found: dict[str, set[str]] = {}
    recipes = (ROOT / "src" / "openqwen" / "recipes").glob("*.yaml")
    for page in (*GUIDES.glob("*.md"), ROOT / "README.md", *recipes):
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^[ #`]*(openqwen [a-z].*)$", text, re.M):
            words = re.split(r"[`#|]| > ", line)[0].split()[1:]
            verb = " ".join(
                words[:2] if words[0] in TWO_WORDS and words[1][0] != "-" else words[:1]
            )
            flags = {word.split("=")[0] for word in words if word.startswith("--")} - {"--help"}
            if verb == "evaluate" and "--corpus" in flags:  # the recipes' stage
                verb = "evaluate --corpus FOLDER"
            found.setdefault(verb, set()).update(flags)
    return found


@pytest.mark.parametrize(("verb", "flags"), sorted(written_commands().items()))
def test_every_flag_of_a_written_command_exists(verb, flags, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with contextlib.suppress(SystemExit):
        main([*verb.split(), "--help"])
    printed = capsys.readouterr().out
    assert [flag for flag in sorted(flags) if not re.search(rf"{flag}(?![-.\w])", printed)] == []


@pytest.fixture(scope="session")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that three pages begin with, once for all of them."""
    folder = tmp_path_factory.mktemp("quick")
    shell("openqwen run quick --until sft", folder)
    return folder / "runs"


def test_every_guide_is_tested():
    assert {page.stem for page in GUIDES.glob("*.md")} == set(RESULTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESULTS)
def test_the_commands_of_a_guide(name, quick, tmp_path):
    if name != "pretrain":
        (tmp_path / "runs").symlink_to(quick)
    printed = shell(script(GUIDES / f"{name}.md"), tmp_path)
    assert [path for path in RESULTS[name] if not (tmp_path / path).is_file()] == []
    if name == "align":
        counts = re.findall(r"(\d+) of 20 right", printed)
        assert int(counts[1]) > int(counts[0])
    if name == "serve":
        assert "['pirate', 'sft']" in printed
