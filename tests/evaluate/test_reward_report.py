"""Records scored by a reward model, the statistics of their pairs, and `openqwen reward score`."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from openqwen import cli
from openqwen.engine.score import RewardModel
from openqwen.evaluate import EvaluateConfig, score_file
from openqwen.evaluate.reward import evaluate_reward
from openqwen.evaluate.reward_report import reward_report
from openqwen.evaluate.scored_records import score_records
from openqwen.model import ModelConfig, Packed, Scorer, initialize, save_checkpoint
from openqwen.support.errors import OpenQwenError
from openqwen.support.stage import StageRun
from openqwen.tokenizer import TokenizerConfig, train_tokenizer

CRITERIA = {"truthfulness": 1.0, "conciseness": -0.5}


def saved(folder, criteria):
    tokenizer = train_tokenizer(["one two three good bad"] * 9, TokenizerConfig(vocabulary=300))
    scorer = Scorer(ModelConfig(384, 32, 48, 2, 4, 2, max_position_embeddings=128), criteria)
    initialize(scorer, torch.Generator().manual_seed(1))
    with torch.no_grad():
        scorer.score.weight.mul_(50)
    save_checkpoint(scorer, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("reward"), CRITERIA)


@pytest.fixture(scope="module")
def model(folder):
    return RewardModel.load(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return RewardModel.load(saved(tmp_path_factory.mktemp("plain"), None))


def alone(model, *turns):
    """The scores of one conversation, computed by itself."""
    roles = ("user", "assistant") * len(turns)
    talk = [{"role": role, "content": text} for role, text in zip(roles, turns)]
    ids, mask = model.tokenizer.encode_chat(talk)
    ids = torch.tensor(ids[: len(mask) - mask[::-1].index(1)])
    one = Packed.from_lengths([len(ids)])
    with torch.inference_mode():
        scores = model.scorer(ids, one.positions, one, torch.tensor([len(ids) - 1]))[0]
    return dict(zip(model.scorer.criteria, scores.tolist()))


def reward_of(model, *turns):
    scores = alone(model, *turns)
    return sum(model.scorer.criteria[name] * value for name, value in scores.items())


def as_records(records):
    return [(f"record {n}", record) for n, record in enumerate(records, 1)]


RECORDS = [
    {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]},
    {"prompt": "one", "chosen": "good", "rejected": "bad", "subset": "chat"},  # RewardBench
    {  # TRL's conversational form, with the prompt in both answers
        "chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "good"}],
        "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}],
    },
    {"prompt": "one", "chosen": ["good"], "rejected": ["bad", "two", "three"]},  # RewardBench 2
    {"prompt": "one", "completion": "three"},
]


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_every_answer_has_the_score_that_it_has_alone(model, budget):
    found = list(score_records(model, as_records(RECORDS), budget))
    assert [{**record, **given} for record, given in zip(found, RECORDS)] == found
    close = lambda value: pytest.approx(value, abs=1e-4)
    assert found[0]["reward"] == close(reward_of(model, "one", "two"))
    assert found[0]["reward_by_criterion"] == close(alone(model, "one", "two"))
    assert found[1]["reward_chosen"] == close(reward_of(model, "one", "good"))
    assert found[1]["reward_rejected"] == close(reward_of(model, "one", "bad"))
    assert found[2]["reward_rejected"] == close(reward_of(model, "q", "bad"))
    assert found[3]["reward_chosen"] == [close(reward_of(model, "one", "good"))]
    assert found[3]["reward_rejected"] == [
        close(reward_of(model, "one", text)) for text in ("bad", "two", "three")
    ]
    assert found[3]["reward_by_criterion_rejected"][1] == close(alone(model, "one", "two"))
    assert found[4]["reward"] == close(reward_of(model, "one", "three"))


def test_one_criterion_is_the_reward_alone(plain):
    (record,) = score_records(plain, as_records(RECORDS[:1]))
    assert record["reward"] == pytest.approx(alone(plain, "one", "two")["reward"], abs=1e-5)
    assert "reward_by_criterion" not in record


def test_an_answer_beyond_the_window_has_no_score(model):
    record = RECORDS[3] | {"rejected": ["bad", "two " * 200]}
    (found,) = score_records(model, as_records([record]))
    assert found["reward_rejected"] == [
        pytest.approx(reward_of(model, "one", "bad"), abs=1e-4),
        None,
    ]
    assert reward_report([found])["pair_accuracy_n"] == 1


def test_records_without_an_answer_are_refused(model):
    for record in ({"prompt": "one"}, {"messages": [{"role": "user", "content": "one"}]}):
        with pytest.raises(OpenQwenError, match="record 1"):
            list(score_records(model, as_records([record])))


def test_a_score_that_is_no_number_names_its_record(plain):
    broken = RewardModel(plain.scorer, plain.tokenizer)
    weight = plain.scorer.score.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
    try:
        with pytest.raises(OpenQwenError, match=r"not finite.*\n.*record 1 to record 5"):
            list(score_records(broken, as_records(RECORDS)))
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def scored(chosen, rejected, gap, prompt="p", **more):
    rewards = {"reward_chosen": gap, "reward_rejected": 0.0}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **rewards, **more}


def test_accuracy_by_task_and_length_by_hand():
    records = [
        scored("aaa", "a", 2.0, "p", subset="long"),
        scored("a", "aaaa", -1.0, "q", subset="short"),
        scored("aa", "bb", 0.0, "r", subset="short"),
        scored("aaaaa", "", 1.0, "s", subset="long"),
        {"messages": [], "reward": 3.0},
    ]
    report = reward_report(records)
    assert (report["pair_accuracy"], report["pair_accuracy_n"]) == (2.5 / 4, 4)
    assert report["list_accuracy"] == 2.5 / 4
    lists = [
        scored("a", ["b", "c"], 0.0) | {"reward_chosen": 1.0, "reward_rejected": r}
        for r in ([0.0, 2.0], [0.0, 0.5])
    ]
    lists[1]["prompt"] = "q"
    assert reward_report(lists)["list_accuracy"] == 0.5
    assert reward_report(lists)["pair_accuracy"] == 0.75
    tasks = report["pair_accuracy_by_task"]
    assert [(tasks[name]["accuracy"], tasks[name]["n"]) for name in ("long", "short")] == [
        (1.0, 2),
        (0.25, 2),
    ]
    assert report["pair_accuracy_low"] < 2.5 / 4 < report["pair_accuracy_high"]
    assert [(b["from"], b["to"], b["accuracy"]) for b in report["by_length"]] == [
        (-3, -3, 0.0),
        (0, 0, 0.5),
        (2, 2, 1.0),
        (5, 5, 1.0),
    ]
    assert report["prefers_longer"] == 1.0
    assert report["chosen_longer"] == pytest.approx(2 / 3)
    assert reward_report([{"messages": [], "reward": 3.0}]) == {}


def test_criteria_are_judged_by_their_own_scores():
    record = scored("good", "bad", 1.0, criteria={"a": 1, "b": -1, "overall": 0})
    record |= {"reward_by_criterion_chosen": {"a": 1.0, "b": 2.0}}
    record |= {"reward_by_criterion_rejected": {"a": 0.0, "b": 1.0}}
    other = scored("good", "bad", -1.0)
    report = reward_report([record, other])
    assert (report["pair_accuracy"], report["pair_accuracy_n"]) == (0.0, 1)  # the first is a tie
    found = {name: row["accuracy"] for name, row in report["by_criterion"].items()}
    assert found == {"a": 1.0, "b": 0.0}


def test_rewards_that_mean_what_they_say_are_calibrated():
    """A pair's ranking is right with probability σ(gap); twice the gap claims too much."""
    rng = np.random.default_rng(0)
    gaps = np.abs(rng.normal(0, 1.5, 6_000))
    right = rng.random(6_000) < 1 / (1 + np.exp(-gaps))
    signed = np.where(right, gaps, -gaps)
    honest = reward_report([scored("a", "b", float(g), str(n)) for n, g in enumerate(signed)])
    boastful = reward_report([scored("a", "b", float(2 * g), str(n)) for n, g in enumerate(signed)])
    assert honest["calibration_error"] < 0.02
    assert boastful["calibration_error"] > 0.05
    for row in honest["calibration"]:
        assert row["low"] - 0.01 < row["predicted"] < row["high"] + 0.01
    assert sum(row["n"] for row in honest["calibration"]) == 6_000


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_the_verb_scores_a_file(folder, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "mixed.jsonl", RECORDS)
    assert cli.main(["reward", "score", str(file), "--model", str(folder)]) == 0
    found = [json.loads(line) for line in (tmp_path / "mixed.scored.jsonl").open(encoding="utf-8")]
    assert found == list(score_records(model, as_records(RECORDS)))
    printed = capsys.readouterr().out
    for text in ("5 records in mixed.scored.jsonl", "all pairs", "chat", "the longer answer"):
        assert text in printed
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert cli.main(["reward", "score", str(file), "--model", str(folder)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_an_interrupted_run_goes_on(folder, model, tmp_path, monkeypatch):
    file = write(tmp_path / "data.jsonl", RECORDS * 6)
    output, arguments = tmp_path / "out.jsonl", ["reward", "score", str(tmp_path / "data.jsonl")]
    arguments += ["--model", str(folder), "--output", str(output), "--batch-tokens", "50"]
    whole = list(score_records(model, as_records(RECORDS * 6), 50))
    asked = []

    def stopping(scorer, records, budget):
        for number, record in enumerate(score_records(scorer, records, budget)):
            if number == 13:
                raise KeyboardInterrupt
            yield record

    def counting(scorer, records, budget):
        records = list(records)
        asked.append(len(records))
        yield from score_records(scorer, records, budget)

    monkeypatch.setattr(score_file, "score_records", stopping)
    assert cli.main(arguments) == 130
    assert not output.exists()
    (partial,) = tmp_path.glob(".out.jsonl.*.partial")
    with open(partial, "a", encoding="utf-8") as lines:
        lines.write('{"messages": [{"ro')  # a kill cuts a line
    monkeypatch.setattr(score_file, "score_records", counting)
    assert cli.main(arguments) == 0
    assert asked == [17]
    found = [json.loads(line) for line in output.open(encoding="utf-8")]
    for mine, right in zip(found, whole, strict=True):
        for key, value in right.items():
            if key in ("reward", "reward_chosen", "reward_rejected"):
                value = pytest.approx(value, abs=1e-5)  # other answers stood beside it
            if not key.startswith("reward_by"):
                assert mine[key] == value
    assert not partial.exists()
    file.write_text(json.dumps(RECORDS[0]) + "\n", encoding="utf-8")  # other data begin anew
    output.unlink()
    assert cli.main(arguments) == 0
    assert asked == [17, 1]


def test_the_stage_scores_all_pairs_and_near_misses(folder, model, tmp_path):
    made = tmp_path / "prefer"
    made.mkdir()
    for split, count in (("test", 4), ("heldout", 3)):
        pairs = [
            {
                "prompt": [{"role": "user", "content": f"one {'two ' * n}"}],
                "chosen": [{"role": "assistant", "content": "good"}],
                "rejected": [{"role": "assistant", "content": "bad"}],
                "origin": {"task": "words", "temperature": 1.0 if n % 2 else 1.5},
            }
            for n in range(count)
        ]
        write(made / f"{split}.jsonl", pairs)
    (tmp_path / "out").mkdir()
    inputs = {"reward": folder, "preferences": made}
    metrics = evaluate_reward(
        StageRun(EvaluateConfig(), inputs, tmp_path / "out", tmp_path, 1, "evaluate-reward")
    )
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    right = [
        reward_of(model, f"one {'two ' * n}", "good") > reward_of(model, f"one {'two ' * n}", "bad")
        for n in range(4)
    ]
    assert scores["test_pair_accuracy"] == sum(right) / 4
    assert scores["test_near_accuracy"] == sum(right[1::2]) / 2
    assert scores["pair_accuracy"] == pytest.approx(sum(right[:3]) / 3)
    assert (scores["test_near_accuracy_n"], scores["near_accuracy_n"]) == (2, 1)
    assert {"test_calibration", "by_length", "test_by_criterion"} <= scores.keys()
    shown = [name for name in metrics if not name.endswith(("_low", "_high"))][:4]
    assert shown == ["test_pair_accuracy", "test_near_accuracy", "pair_accuracy", "near_accuracy"]
    assert len((tmp_path / "out" / "test.jsonl").read_text().splitlines()) == 4


def test_a_chat_model_is_no_reward_model(tmp_path, capsys):
    from openqwen.model import Qwen2

    tokenizer = train_tokenizer(["one two"] * 9, TokenizerConfig(vocabulary=270))
    chat = Qwen2(ModelConfig(300, 32, 48, 2, 4, 2, max_position_embeddings=64))
    initialize(chat, torch.Generator().manual_seed(0))
    save_checkpoint(chat, tokenizer, tmp_path / "chat")
    file = write(tmp_path / "data.jsonl", RECORDS)
    assert cli.main(["reward", "score", str(file), "--model", str(tmp_path / "chat")]) == 1
    assert "openqwen reward" in capsys.readouterr().err


def test_help_and_the_stage_keep_their_verbs():
    for words, text in ((["reward", "score"], "--batch-tokens"), (["reward"], "--preferences")):
        command = [sys.executable, "-m", "openqwen.cli", *words, "--help"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0
        assert text in done.stdout
