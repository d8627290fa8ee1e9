"""A run of the whole recipe, small enough for a test: seconds a stage, real input, every stage
real.
"""

import json
import random
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

SETTINGS = """
seed: 3
corpus: {task_documents: 60, weights: {tasks: 3}, heldout_share: 0.1}
tokenizer: {vocabulary: 600, max_bytes: 400000}
pretrain:
  network: {hidden_size: 64, intermediate_size: 160, layers: 2, heads: 2, kv_heads: 1}
  data: {tokens: 120000, context: 96, batch_tokens: 2048, micro_tokens: 1024}
  train: {learning_rate: 4e-3}
  save: {seconds: 0.3}
extend:
  data: {tokens: 20000, context: 256, batch_tokens: 2048}
  train: {learning_rate: 1e-3}
  save: {seconds: 0.3}
instruct: {demonstrations: 600, repurposed: 50, prompts: 60}
sft: {epochs: 4, batch: 8, max_length: 200, train: {learning_rate: 3e-3}, save: {seconds: 0.3}}
prefer: {prompts: 60, heldout_prompts: 30, samples: 2}
reward: {batch: 16, max_length: 200, train: {learning_rate: 1e-3}, save: {seconds: 0.3}}
dpo:
  {batch: 16, first_difference: true, hottest: 1.0, max_length: 200, train: {learning_rate: 1e-4}, save: {seconds: 0.3}}
online_dpo: {steps: 4, batch: 6, samples: 3, max_tokens: 16, train: {learning_rate: 1e-4}, save: {seconds: 0.1}}
grpo: {episodes: 4, batch: 6, samples: 4, updates: 2, max_tokens: 16, train: {learning_rate: 1e-4}, save: {seconds: 0.1}}
evaluate: {context: 128, heldout_bytes: 20000, checked: 34, test: 34, sample_tokens: 12}
"""


def make_corpus(folder: Path) -> None:
    """Some eighty modules of the standard library: real code with real docstrings."""
    library = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(p for p in library.glob("*.py") if 4_000 < p.stat().st_size < 30_000)
    folder.mkdir()
    for path in random.Random(0).sample(modules, 60):
        shutil.copyfile(path, folder / path.name)


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small.yaml and corpus/."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "small.yaml").write_text(SETTINGS)
    make_corpus(folder / "corpus")
    return folder


@pytest.fixture(scope="session")
def command(place: Path) -> Callable[..., list[str]]:
    """`openqwen run` on the small recipe, into a folder beside it."""
    start = [
        sys.executable,
        "-m",
        "openqwen.cli",
        "run",
        str(place / "small.yaml"),
        "--corpus",
        str(place / "corpus"),
    ]
    return lambda name, *arguments: [*start, "--output", str(place / name), *arguments]


@pytest.fixture(scope="session")
def run(place: Path, command: Callable[..., list[str]]) -> Path:
    """A finished run."""
    done = subprocess.run(command("run"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (place / "run" / "printed.txt").write_text(done.stdout)
    return place / "run"


@pytest.fixture(scope="session")
def digests() -> Callable[[Path], dict[str, str]]:
    """Of a run folder: stage → digest of what it made."""
    return lambda folder: {
        path.parent.name: json.loads(path.read_text())["digest"]
        for path in sorted(folder.glob("[!.]*/manifest.json"))
    }
