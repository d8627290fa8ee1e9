"""Try the clients of this folder, each in an environment of its own, against `openqwen serve`.

    .venv/bin/python benchmarks/clients/run.py MODEL --quantize int8 [--only litellm lm-eval]

Environments are made once, by pip and npm, in --cache.
Two servers run on loopback: one to work with, and one to meet 429 and 408 at.
The second has a single place and a short time limit.
Each client's script tells its checks as lines of JSON; the last lines of a failing one are shown.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NODE = ["openai-js", "vercel-ai"]
CLIENTS = ["openai-python", *NODE, "langchain", "pydantic-ai", "litellm", "lm-eval", "aider"]
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "ANONYMIZED_TELEMETRY": "False",
}


def main() -> None:
    """Print the table; fails where a check did."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("model", help="a folder, or a .gguf file")
    parser.add_argument("--quantize", help="as for openqwen serve")
    parser.add_argument("--only", nargs="+", default=CLIENTS, choices=CLIENTS)
    cache = Path("~/.cache/openqwen-clients").expanduser()
    parser.add_argument("--cache", type=Path, default=cache)
    given = parser.parse_args()
    made = {client: _environment(client, given.cache) for client in given.only}
    flags = [given.model, "--name", "local", "--max-context", "8192"]
    flags += ["--quantize", given.quantize] if given.quantize else []
    failed = False
    with ExitStack() as stack:
        tokenizer = stack.enter_context(_tokenizer(given.model))
        variables = os.environ | OFFLINE | {"TOKENIZER": tokenizer}
        one = stack.enter_context(_served(flags))
        strict = stack.enter_context(_served([*flags, "--queue", "1", "--timeout", "3"]))
        print("| client | what | outcome |\n|---|---|---|", flush=True)
        for client, command in made.items():
            failed |= _try(client, command, [one, strict], variables)
    sys.exit(failed)


def _environment(client: str, cache: Path) -> list[str] | None:
    """The command of a client's script; None where npm is missing.

    The environment is made where it is not there.
    """
    folder = cache / client
    if client in NODE:
        if not shutil.which("npm"):
            return None
        folder.mkdir(parents=True, exist_ok=True)
        # Node looks for modules from the script upwards.
        script = f"try_{client.replace('-', '_')}.mjs"
        for name in ("package.json", "checks.mjs", script):
            shutil.copy(HERE / name, folder)
        npm = ["npm", "install", "--no-audit", "--no-fund", "--silent"]
        subprocess.run(npm, cwd=folder, check=True)
        return ["node", str(folder / script)]
    python, wanted = folder / "bin/python", HERE / f"requirements-{client}.txt"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", wanted], check=True)
    return [str(python), str(HERE / f"try_{client.replace('-', '_')}.py")]


@contextmanager
def _tokenizer(model: str) -> Iterator[str]:
    """A folder with the model's tokenizer in Hugging Face's form."""
    from openqwen.tokenizer import load_tokenizer

    with tempfile.TemporaryDirectory() as folder:
        load_tokenizer(model).save(folder)
        yield folder


@contextmanager
def _served(flags: list[str]) -> Iterator[str]:
    """The address of a server, which ends with the block."""
    command = [sys.executable, "-m", "openqwen.cli", "serve", *flags, "--port", "0"]
    own: Any = {"text": True, "env": os.environ | {"COLUMNS": "1000"}}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **own)
    try:
        assert server.stdout is not None
        yield next(filter(None, map(_address, server.stdout)))
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def _address(line: str) -> str:
    return "".join(re.findall(r"http://\S+:\d+$", line))


def _try(client: str, command: list[str] | None, urls: list[str], own: dict[str, str]) -> bool:
    """Print a client's rows; whether one failed."""
    if command is None:
        print(f"| {client} | all | left out: npm is missing |", flush=True)
        return False
    done = subprocess.run([*command, *urls], env=own, capture_output=True, text=True)
    told = [line for line in done.stdout.splitlines() if line.startswith('{"what"')]
    rows: list[Any] = [json.loads(line) for line in told]
    for row in rows:
        why = " ".join(row["why"].split())
        print(f"| {client} | {row['what']} | {row['outcome']}{': ' * bool(why)}{why} |", flush=True)
    failed = done.returncode != 0 or any(row["outcome"] == "failed" for row in rows)
    if failed:
        print(done.stderr[-3000:], file=sys.stderr)
    return failed


if __name__ == "__main__":
    main()
