"""Two and four processes train what one process trains, and a state made on some ranks goes on on
others.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from openqwen.model import ModelConfig, Qwen2, Scorer, initialize, save_checkpoint, save_weights
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import write_json
from openqwen.tokenizer import TokenizerConfig, train_tokenizer
from openqwen.train.parallel import ParallelConfig, World
from openqwen.train.parallel.degrees import check

RANKS, LOADING, ONLINE = (
    Path(__file__).with_name(f"{name}.py") for name in ("ranks", "loading", "online")
)
NEVER = 99
KINDS = ["dense", "experts", "dual", "reward", "adapters"]
KINDS += ["muon-dense", "muon-experts", "muon-adapters"]
TWO = ["dense", "dense:tensor=2", "dual:context=2", "experts:expert=2", "experts:context=2"]
TWO += ["muon-experts:expert=2"]
MORE = ["dense:context=2", "reward:context=2", "reward:tensor=2", "experts", "experts:tensor=2"]
MORE += ["adapters", "adapters:context=2", "muon-dense", "muon-dense:tensor=2", "muon-adapters"]
FOUR = ["dense", "dense:tensor=2", "dense:tensor=2:context=2", "dense:context=4", "dual:context=4"]
FOUR += [
    "dual:tensor=2:context=2",
    "experts:expert=4",
    "experts:expert=2",
    "experts:expert=2:context=2",
]
FOUR += ["experts:tensor=2:expert=2", "reward:tensor=2:context=2", "muon-dense:tensor=2"]
FOUR += ["muon-experts:tensor=2:expert=2", "muon-adapters"]


def start(ranks, script, *arguments):
    """Run a script on so many processes; returns what they printed."""
    launch = [sys.executable]
    if ranks > 1:
        launch += [
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(ranks),
            "--master-addr",
            "127.0.0.1",
        ]
        launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    done = subprocess.run(
        [*launch, str(script), *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run(folder, ranks, *cases, stop_at=NEVER):
    """Train the cases on so many processes, each in its folder."""
    folder.mkdir(exist_ok=True)
    (folder / "told").write_text(start(ranks, RANKS, folder, stop_at, *cases))
    return folder


def log(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def close(ours, theirs):
    """The logs of two runs are those of one computation."""
    ours, theirs = log(ours), log(theirs)
    assert [e["step"] for e in ours] == list(range(4))
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert mine["gradient_norm"] == pytest.approx(expected["gradient_norm"], rel=1e-3)
        assert mine["tokens"] == expected["tokens"]


def equal(ours, theirs):
    """The first step's loss and gradient, and the steps after it."""
    first, expected = log(ours)[0], log(theirs)[0]
    for name in expected.keys() - {"seconds", "tokens_per_second", "peak_memory"}:
        # A margin is a difference of scores that are rounded in float32.
        least = 1e-7 if name == "margin" else 1e-9
        assert first[name] == pytest.approx(expected[name], rel=1e-5, abs=least), name
    moved = 5e-3 if "muon" in ours.name else 1e-3  # PyTorch's Muon computes in bfloat16
    for file, bound in (("gradient.safetensors", 1e-6), ("weights.safetensors", moved)):
        mine, right = load_file(ours / file), load_file(theirs / file)
        assert mine.keys() == right.keys()
        for name, tensor in right.items():
            torch.testing.assert_close(
                mine[name], tensor, rtol=1e-3, atol=bound, msg=f"{file} {name}"
            )
    close(ours, theirs)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), 1, *KINDS)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"), 2, *TWO)


@pytest.fixture(scope="module")
def two_more(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"), 2, *MORE)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return run(tmp_path_factory.mktemp("four"), 4, *FOUR)


@pytest.mark.parametrize("case", TWO)
def test_two_processes_train_what_one_trains(one, two, case):
    equal(two / case.replace(":", "-"), one / case.split(":")[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_two_processes_train_other_kinds_too(one, two_more, case):
    equal(two_more / case.replace(":", "-"), one / case.split(":")[0])


@pytest.mark.slow
@pytest.mark.parametrize("case", FOUR)
def test_four_processes_train_what_one_trains(one, four, case):
    equal(four / case.replace(":", "-"), one / case.split(":")[0])


LOW = [
    "low-dense",
    "low-dense:context=2",
    "low-experts:expert=2",
    "low-experts:tensor=2",
    "low-adapters",
]


@pytest.mark.slow
def test_in_bfloat16_processes_gather_rounded_weights_and_train_what_one_trains(tmp_path):
    one = run(tmp_path / "one", 1, *sorted({case.split(":")[0] for case in LOW}))
    two = run(tmp_path / "two", 2, *LOW)
    assert "low-dense torch.float32 {torch.float32}" in (one / "told").read_text()
    assert "low-dense torch.bfloat16 {torch.float32}" in (two / "told").read_text()
    for case in LOW:
        ours, theirs = two / case.replace(":", "-"), one / case.split(":")[0]
        mine, right = (
            torch.cat(
                [g.flatten() for _, g in sorted(load_file(f / "gradient.safetensors").items())]
            )
            for f in (ours, theirs)
        )
        assert float((mine - right).norm() / right.norm()) < 0.02, case
        assert [e["loss"] for e in log(ours)] == pytest.approx(
            [e["loss"] for e in log(theirs)], rel=5e-3
        ), case


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((2, "dense:tensor=2"), (1, "dense")),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in (
                ((2, "dense"), (1, "dense")),
                ((1, "dense"), (2, "dense")),
                ((4, "dense:tensor=2"), (2, "dense:context=2")),
                ((4, "experts:expert=2"), (2, "experts")),
                ((2, "experts:expert=2"), (4, "experts:tensor=2:expert=2")),
            )
        ),
    ],
)
def test_a_state_goes_on_on_another_mesh(one, tmp_path, first, second):
    (ranks, case), (others, then) = first, second
    begun = run(tmp_path, ranks, case, stop_at=2) / case.replace(":", "-")
    assert len(list((begun / "state-00000002").glob("*.safetensors"))) == ranks
    goes_on = tmp_path / then.replace(":", "-")
    if goes_on != begun:
        shutil.move(begun, goes_on)
    run(tmp_path, others, then)
    close(goes_on, one / then.split(":")[0])


@pytest.mark.slow
def test_a_rank_reads_its_own_part_of_a_checkpoint_and_no_more(tmp_path):
    config = ModelConfig(16_384, 1_024, 2_816, 8, 8, 4, tie_word_embeddings=True)
    model = Qwen2(config).bfloat16()  # 212 MB, twice as much in float32
    write_json(tmp_path / "config.json", config.to_json())
    save_weights(model, tmp_path)
    shares = [
        float(line.split()[1])
        for line in start(4, LOADING, tmp_path).splitlines()
        if "share" in line
    ]
    assert len(shares) == 4
    assert max(shares) < 0.45  # a quarter, and what sharding itself imports


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A model that says anything and so stops now and then, a reward model, and prompts."""
    folder = tmp_path_factory.mktemp("chats")
    tokenizer = train_tokenizer(["one two three"] * 9, TokenizerConfig(vocabulary=300))
    config = ModelConfig(
        384, 32, 48, 2, 4, 2, max_position_embeddings=256, tie_word_embeddings=True
    )
    model, scorer = Qwen2(config), Scorer(config)
    initialize(model, torch.Generator().manual_seed(1))
    initialize(scorer, torch.Generator().manual_seed(2))
    save_checkpoint(model, tokenizer, folder / "model")
    save_checkpoint(scorer, tokenizer, folder / "reward")
    asked = [
        {"prompt": [{"role": "user", "content": text}]}
        for text in ("one", "two", "three", "one two")
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in asked))
    return folder


@pytest.mark.parametrize("tensor", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", ["online-dpo", "grpo"])
def test_online_stages_over_two_processes(chats, tmp_path, tensor, stage):
    start(1, ONLINE, chats, tmp_path / "one", 1, stage)
    start(2, ONLINE, chats, tmp_path / "two", tensor, stage)
    ours, theirs = log(tmp_path / "two"), log(tmp_path / "one")
    assert sum(entry["tokens"] for entry in theirs) > 0
    for mine, right in zip(ours, theirs, strict=True):
        for name in ("loss", "gradient_norm", "tokens", "reward", "length", "kl", "entropy"):
            assert mine.get(name) == pytest.approx(right.get(name), rel=1e-3, abs=1e-6), name


def test_every_rank_gets_as_many_micro_batches():
    micros = list("abcde")
    shares = [World(rank, 3).local_micro_batches(micros) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 2]
    assert sorted(m for share in shares for m, counts in share if counts) == micros
    assert World().local_micro_batches(micros) == [(m, True) for m in micros]
    assert World(1, 2).local_micro_batches([]) == []


@pytest.mark.parametrize(
    ("degrees", "size", "what"),
    [
        ({"tensor": 8}, 8, "4 key/value heads cannot be divided among 8 ranks"),
        (
            {"tensor": 2, "context": 4},
            8,
            "14 query heads of a rank cannot be divided among 4 ranks",
        ),
        ({"expert": 2}, 2, "A dense network has no experts"),
        ({"tensor": 2}, 3, "3 processes are no multiple of tensor x expert x context = 2"),
        ({"context": 2}, 1, "1 process is no multiple"),
    ],
)
def test_degrees_that_do_not_fit_are_named(degrees, size, what):
    with pytest.raises(OpenQwenError, match=what):
        check(ParallelConfig(**degrees), ModelConfig.named("qwen2.5-7b"), size)
    check(ParallelConfig(tensor=4, context=7), ModelConfig.named("qwen2.5-7b"), 28)
