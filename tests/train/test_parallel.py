"""Two and four processes train what one process trains, and a state made on some ranks goes on on others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from openqwen.train.parallel import World

RANKS = Path(__file__).with_name("ranks.py")
NEVER = 99
OTHER = [(1, 2), (4, 2)]


def run(folder, ranks, stop_at=NEVER, adapters=False):
    """Train in `folder` on so many processes; returns the log."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1"]
        launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    kind = "adapters" if adapters else "full"
    folder.mkdir(exist_ok=True)
    done = subprocess.run([*launch, str(RANKS), str(folder), str(stop_at), kind], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def close(log, expected):
    assert [e["step"] for e in log] == list(range(10))
    for ours, theirs in zip(log, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-3)
        assert ours["tokens"] == theirs["tokens"]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    return folder, run(folder, 1)


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_many_processes_train_what_one_trains(single, tmp_path, ranks):
    folder, expected = single
    log = run(tmp_path, ranks)
    assert log[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    assert log[0]["gradient_norm"] == pytest.approx(expected[0]["gradient_norm"], rel=1e-5)
    close(log, expected)
    ours, theirs = load_file(tmp_path / "weights.safetensors"), load_file(folder / "weights.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("first", "second"), [(2, 1), *(pytest.param(*n, marks=pytest.mark.slow) for n in ((1, 2), (4, 2)))]
)
def test_a_state_goes_on_on_another_number_of_ranks(single, tmp_path, first, second):
    run(tmp_path, first, stop_at=5)
    files = list((tmp_path / "state-00000005").glob("*.safetensors"))
    assert len(files) == first
    close(run(tmp_path, second), single[1])


@pytest.mark.slow
def test_adapters_train_sharded(tmp_path):
    expected = run(tmp_path / "one", 1, adapters=True)
    close(run(tmp_path / "two", 2, adapters=True), expected)


def test_every_rank_gets_as_many_micro_batches():
    micros = list("abcde")
    shares = [World(rank, 3).share(micros) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert sorted(m for share in shares for m, counts in share if counts) == micros
    assert World().share(micros) == [(m, True) for m in micros]
    assert World(1, 2).share([]) == []
