"""The wheel, installed outside of the checkout, has all that the program needs."""

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
from pathlib import Path

import pytest
import torch

from openqwen.model import ModelConfig, Qwen2, initialize, save_checkpoint
from openqwen.tokenizer import TokenizerConfig, train_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `openqwen` of a fresh environment, which takes its dependencies from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns("*.egg-info", "__pycache__", "*.so", "*.dylib")
    shutil.copytree(ROOT / "src", source / "src", ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("*.whl")
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run(
        [*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True
    )
    (packages,) = environment.glob("lib/python*/site-packages")
    # A line of a .pth file is a folder to import from. The .pth files in that folder are not read,
    # so the checkout, which is installed there, cannot be imported.
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return environment / "bin" / "openqwen"


@pytest.fixture
def environment() -> dict[str, str]:
    variables = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    return variables | {"COLUMNS": "150"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer(["Say one. Two. " * 9], TokenizerConfig(vocabulary=270))
    network = Qwen2(ModelConfig(384, 32, 48, 2, 4, 2, max_position_embeddings=256))
    initialize(network, torch.Generator().manual_seed(1))
    save_checkpoint(network, tokenizer, tmp_path / "model")
    return tmp_path / "model"


def call(program: Path, *arguments: str, folder: Path, environment: dict[str, str], **more) -> str:
    done = subprocess.run(
        [program, *arguments], cwd=folder, env=environment, capture_output=True, text=True, **more
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_help_names_every_verb(installed, environment, tmp_path):
    assert "online-dpo" in call(installed, "--help", folder=tmp_path, environment=environment)


@pytest.mark.slow
def test_a_shipped_recipe_runs(installed, environment, tmp_path):
    library = Path(sysconfig.get_paths()["stdlib"])
    shutil.copytree(library / "email", tmp_path / "texts", ignore=shutil.ignore_patterns("__*"))
    words = [
        "run",
        "tiny",
        "--until",
        "tokens",
        "--corpus",
        "texts",
        "--corpus.task-documents",
        "40",
    ]
    words += ["--tokenizer.vocabulary", "300"]
    printed = call(installed, *words, folder=tmp_path, environment=environment)
    assert "3 made" in printed
    if shutil.which("c++") or shutil.which("g++"):
        assert "tokenizer compiled" in printed
    assert (tmp_path / "runs" / "tiny" / "tokens" / "manifest.json").is_file()
    assert (tmp_path / "runs" / "tiny" / "report.html").is_file()


@pytest.mark.slow
def test_chat_answers_a_line(installed, environment, model, tmp_path):
    words = ["chat", str(model), "--max-tokens", "4"]
    more = {"folder": tmp_path, "environment": environment, "input": "Say one.\n"}
    call(installed, *words, **more)


@pytest.mark.slow
def test_serve_is_healthy_and_has_its_page(installed, environment, model, tmp_path):
    command = [installed, "serve", str(model), "--port", "8023"]
    server = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        for _ in range(240):
            assert server.poll() is None, server.communicate()[0]
            try:
                urllib.request.urlopen("http://127.0.0.1:8023/health")
                break
            except OSError:  # it is still starting
                time.sleep(0.5)
        page = urllib.request.urlopen("http://127.0.0.1:8023/").read().decode()
        assert "<script" in page
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
