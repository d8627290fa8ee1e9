"""aider against a server: one edit of a file by its command line; see checks.py."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from checks import KEY, MODEL, TOO_LONG, Choice, check, main

NAME = f"openai/{MODEL}"
FLAGS = ["--yes-always", "--edit-format", "whole", "--map-tokens", "0", "--analytics-disable"]
FLAGS += ["--disable-playwright", "--no-check-update", "--no-show-release-notes"]
FLAGS += ["--no-show-model-warnings", "--no-git", "--no-pretty", "--no-suggest-shell-commands"]
FLAGS += ["--no-detect-urls"]
# As aider is told of a model that it does not know.
KNOWN = {"max_tokens": 400, "max_input_tokens": 1 << 20, "max_output_tokens": 400}
KNOWN |= {"input_cost_per_token": 0, "output_cost_per_token": 0}
KNOWN |= {"litellm_provider": "openai", "mode": "chat"}
SETTINGS = f"- name: {NAME}\n  use_temperature: 0\n  extra_params:\n    max_tokens: 300\n"
BEFORE = 'def greet():\n    return "hello"\n'


def _aider(url: str, message: str, *flags: str) -> tuple[str, str]:
    """What it printed, and the file after it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "greet.py").write_text(BEFORE)
        (folder / "known.json").write_text(json.dumps({NAME: KNOWN}))
        (folder / "settings.yml").write_text(SETTINGS)
        server = ["--model", NAME, "--openai-api-base", f"{url}/v1", "--openai-api-key", KEY]
        server += ["--model-metadata-file", "known.json", "--model-settings-file", "settings.yml"]
        program = str(Path(sys.executable).parent / "aider")
        command = [program, *server, *FLAGS, *flags, "--message", message, "greet.py"]
        own = os.environ | {"HOME": name}  # it keeps what it is told about analytics
        options: Any = {"cwd": name, "env": own, "stdin": subprocess.DEVNULL, "timeout": 300}
        done = subprocess.run(command, capture_output=True, text=True, **options)
        said = done.stdout + done.stderr
        print(said, file=sys.stderr)
        assert done.returncode == 0, said[-300:]
        return said, (folder / "greet.py").read_text()


def _edited(url: str, *flags: str) -> None:
    said, after = _aider(url, 'Let greet return "good morning" in place of "hello".', *flags)
    assert "Tokens:" in said, said[-300:]  # what an answer's usage is printed as
    if "good morning" not in after:
        raise Choice(f"the file is then {after!r}")


@check("edit, streamed")
def _streamed(url: str, strict: str) -> None:
    _edited(url)


@check("edit, whole")
def _whole(url: str, strict: str) -> None:
    _edited(url, "--no-stream")


@check("too long")
def _too_long(url: str, strict: str) -> None:
    said, after = _aider(url, TOO_LONG)
    assert "hit a token limit" in said, said[-300:]
    assert after == BEFORE


main()
