"""GRPO: what it learns from, in which order, and that a resumed run gives the same bits."""

import json
import math
import os

import numpy as np
import pytest
import torch
from test_losses import tiny
from torch.testing import assert_close

from openqwen.engine import Output
from openqwen.model import ModelConfig, Qwen2, Scorer, initialize, load_model, save_checkpoint
from openqwen.model.lora import load_adapter, merge_adapters
from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer import TokenizerConfig, train_tokenizer
from openqwen.train import losses
from openqwen.train.grpo import AdvantageGroup, AnswerRows, GrpoConfig, GrpoTraining, grpo, varies
from openqwen.train.losses import token_log_probs
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.rollouts import RolloutGroup
from openqwen.train.trainer import Place

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grpo")
    tokenizer = train_tokenizer(["Say one two three. " * 9], TokenizerConfig(vocabulary=270))
    sizes = {"max_position_embeddings": 256, "tie_word_embeddings": True}
    for kind, name in ((Qwen2, "model"), (Scorer, "reward")):
        model = kind(ModelConfig(384, 32, 48, 2, 4, 2, **sizes))
        initialize(model, torch.Generator().manual_seed(1))
        save_checkpoint(model, tokenizer, folder / name)
    records = [
        {
            "id": word,
            "prompt": [{"role": "user", "content": f"Say {word}."}],
            "grader": "regex",
            "reference": {"pattern": ".*e.*", "answer": "e"},
        }
        for word in WORDS
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder, tokenizer


@pytest.fixture(autouse=True)
def here(monkeypatch):
    monkeypatch.chdir(os.path.dirname(__file__))  # where toy_rewards.py is


def settings(**fields):
    given = {
        "episodes": 3,
        "batch": 4,
        "samples": 4,
        "max_tokens": 6,
        "order": "shuffle",
        "rewards": {"sources": {"toy_rewards:likes_e": 1.0}},
        "train": {"learning_rate": 1e-2},
    }
    return GrpoConfig(**given | fields)


def run(start, folder, config=None, training=None, seed=1):
    folder.mkdir(exist_ok=True)
    place = Place(folder / "out", folder / "scratch", seed, "grpo")
    config = config or settings()
    prompts = start[0] / "prompts.jsonl"
    metrics = grpo(config, start[0] / "model", prompts, start[1], place, start[0] / "reward")
    log = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    return metrics, [json.loads(line) for line in log]


def test_a_shared_prompt_gives_the_loss_and_gradient_of_separate_rows():
    model, reference = tiny(0), tiny(9)
    groups = [
        AdvantageGroup(
            [1, 2, 3],
            [[4, 5], [6], [7, 8, 9]],
            [[1.0, 1.0], [-0.5], [-0.5, 0.0, 0.2]],
            [[-1.0, -2.0], [-3.0], [math.nan] * 3],
        ),
        AdvantageGroup([9, 8], [[7], [6, 5]], [[-1.0], [1.0, 1.0]], [[-2.0], [-1.0, -1.0]]),
    ]
    shared = AnswerRows.of(groups)
    assert len(shared.rows.tokens) == 3 + 1 + 0 + 2 + 2 + 0 + 1
    apart = PackedBatch.of(
        [(g.prompt + a, [0] * len(g.prompt) + [1] * len(a)) for g in groups for a in g.answers]
    )
    found = []
    for rows in (shared.rows, apart):
        with torch.no_grad():
            ref = token_log_probs(reference, rows)
        policy = token_log_probs(model, rows)
        old = policy.detach() + 0.3 * torch.sin(torch.arange(len(policy)))
        loss = losses.grpo(
            policy, shared.advantages, rows.counts, old, ref, shared.sampler, beta=0.1
        )
        loss.sum.backward()
        found.append((loss.sum.detach(), loss.extras, [p.grad.clone() for p in model.parameters()]))
        model.zero_grad()
    assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-4)
    for one, other in zip(found[0][2], found[1][2]):
        assert_close(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


@pytest.mark.parametrize("variant", ["grpo", "dapo", "dr-grpo"])
def test_micro_batches_change_nothing(start, tmp_path, variant):
    logs = []
    for micro in (10_000, 60, 1):  # the smallest budget cuts each group into single answers
        config = settings(micro_tokens=micro, episodes=2, variant=variant, beta=0.1)
        logs.append(run(start, tmp_path / str(micro), config)[1])
    for log in logs[1:]:
        for entry, whole in zip(log, logs[0], strict=True):
            for name in ("loss", "gradient_norm", "reward", "kl", "entropy", "clip_share"):
                assert entry[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-6), name


def test_a_reward_is_learned(start, tmp_path):
    config = settings(episodes=30, batch=8, samples=8)
    metrics, log = run(start, tmp_path, config)
    first, last = log[0]["reward"], log[-1]["reward"]
    assert last > first + 0.25
    assert log[-1]["entropy"] < log[0]["entropy"]
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert log[-1]["kl"] > 0.1
    assert metrics["reward"] == pytest.approx(last, abs=0.2)


class Stop(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"updates": 2, "reference": {"refresh": "average", "decay": 0.5}, "beta": 0.1},
        {"refill": 2, "reference": {"refresh": "copy", "every": 2}, "beta": 0.1},
        {"order": "variance"},
    ],
)
def test_a_killed_run_gives_the_bits_of_an_uninterrupted_one(start, tmp_path, monkeypatch, fields):
    config = settings(episodes=5, save={"seconds": 0}, **fields)
    whole = run(start, tmp_path / "whole", config)[1]
    batch = GrpoTraining.batch
    for last in (3, 4):  # with two updates, once in the midst of an episode

        def killed(self, step, last=last):
            if step == last:
                raise Stop
            return batch(self, step)

        monkeypatch.setattr(GrpoTraining, "batch", killed)
        with pytest.raises(Stop):
            run(start, tmp_path / "cut", config)
    monkeypatch.setattr(GrpoTraining, "batch", batch)
    resumed = run(start, tmp_path / "cut", config)[1]
    timed = ("seconds", "tokens_per_second", "peak_memory")
    for one, other in zip(resumed, whole, strict=True):
        assert {k: v for k, v in one.items() if k not in timed} == {
            k: v for k, v in other.items() if k not in timed
        }
    for name in ("model.safetensors", "samples.jsonl"):
        one, other = (tmp_path / folder / "out" / name for folder in ("whole", "cut"))
        assert one.read_bytes() == other.read_bytes()
    assert load_model(tmp_path / "cut" / "out").config.vocab_size == 384


def answer(*ids, finish="stop", logprobs=()):
    return Output(
        token_ids=list(ids), finish_reason=finish, prompt_ids=[1, 2], logprobs=list(logprobs)
    )


def test_answers_without_a_reward_have_no_part():
    outputs = [answer(3), answer(4, 5, logprobs=(-1.0,)), answer(6), answer(7, finish="length")]
    group = RolloutGroup(0, outputs, [1.0, math.nan, 0.0, 0.0])
    made = AdvantageGroup.of(group, scale=False)
    assert made.answers == [[3], [6], [7]]
    assert [values[0] for values in made.advantages] == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    masked = AdvantageGroup.of(group, scale=False, mask_truncated=True)
    assert masked.answers == [[3], [6]]
    assert [values[0] for values in masked.advantages] == pytest.approx([2 / 3, -1 / 3])
    assert not varies(RolloutGroup(0, outputs, [math.nan] * 4))
    assert not varies(RolloutGroup(0, outputs, [0.5, 0.5, 0.5 + 1e-9, math.nan]))
    assert varies(group)
    nothing = AdvantageGroup.of(RolloutGroup(0, outputs, [math.nan] * 4), scale=True)
    assert nothing.pieces(100) == []


def test_a_token_has_the_advantage_that_its_branch_adds():
    answers = [[5, 6, 0], [5, 6, 0], [5, 7, 8, 0], [5, 6, 9]]
    found = losses.token_advantages(answers, [1.0, 1.0, -1.0, -1.0])
    third = 1 / 3
    assert found[0] == found[1] == pytest.approx([0, third, 1 - third])
    assert found[2] == pytest.approx([0, -1, 0, 0]), "nothing behind the token that decides"
    assert found[3] == pytest.approx([0, third, -1 - third])


def test_the_advantages_of_tokens_are_differences_of_means_and_sum_to_the_answers():
    rng = np.random.default_rng(0)
    for _ in range(50):
        answers = [[*rng.integers(1, 3, rng.integers(1, 6)).tolist(), 0] for _ in range(8)]
        rewards = {str(answer): float(rng.integers(2)) for answer in answers}
        whole = losses.group_advantages([rewards[str(answer)] for answer in answers])
        for ids, value, found in zip(answers, whole, losses.token_advantages(answers, whole)):
            means = [
                np.mean([v for a, v in zip(answers, whole) if a[:n] == ids[:n]])
                for n in range(len(ids) + 1)
            ]
            assert found == pytest.approx(np.diff(means), abs=1e-12)
            assert sum(found) == pytest.approx(value)
    group = RolloutGroup(0, [answer(3, 4), answer(3, 5)], [1.0, 0.0])
    assert AdvantageGroup.of(group, True, by_token=True).advantages[0] == pytest.approx(
        [0, 1], 1e-3
    )


def test_groups_without_variance_are_counted_and_teach_nothing(start, tmp_path):
    rewards = {"sources": {"toy_rewards:same": 1.0}}
    _, log = run(start, tmp_path / "kept", settings(rewards=rewards, beta=0.0))
    assert all(entry["without_variance"] == 1.0 for entry in log)
    assert all(entry["loss"] == 0.0 and entry["gradient_norm"] == 0.0 for entry in log)
    _, log = run(start, tmp_path / "refilled", settings(rewards=rewards, refill=3))
    assert all(entry["refilled"] == 0.0 for entry in log)


def test_groups_without_variance_are_replaced(start, tmp_path, monkeypatch):
    """Only the prompts four to eight have answers of different rewards."""
    seen = []

    def grade(self, records, outputs):
        seen.extend(record["id"] for record in records)
        late = [WORDS.index(record["id"]) >= 3 for record in records]
        return [float(n % 2) * is_late for n, is_late in enumerate(late)]

    monkeypatch.setattr("openqwen.train.reward_sources.RewardSources.__call__", grade)
    _, log = run(start, tmp_path, settings(refill=5, episodes=2))
    for entry in log:
        assert entry["refilled"] == pytest.approx(entry["without_variance"])
    assert sum(entry["without_variance"] for entry in log) > 0
    assert set(seen) == set(WORDS)


def test_prompts_come_by_the_variance_of_their_rewards(start, tmp_path, monkeypatch):
    def grade(self, records, outputs):
        return [(n % 2) * float(WORDS.index(r["id"])) for n, r in enumerate(records)]

    monkeypatch.setattr("openqwen.train.reward_sources.RewardSources.__call__", grade)
    place = Place(tmp_path / "out", tmp_path / "scratch", 1, "grpo")
    place.scratch.mkdir()
    config = settings(order="variance", batch=3, episodes=4)
    given = config, start[0] / "model", start[0] / "prompts.jsonl", start[1], place, None
    order = GrpoTraining(*given)._order()
    assert order == [7, 6, 5, 4, 3, 2, 1, 0, 7, 6, 5, 4]
    monkeypatch.setattr(GrpoTraining, "_sample", None)
    assert GrpoTraining(*given)._order() == order  # from the file


def test_several_updates_clip_the_ratio(start, tmp_path):
    _, log = run(start, tmp_path, settings(updates=2, episodes=4, train={"learning_rate": 0.1}))
    assert len(log) == 8
    assert all(entry["clip_share"] == 0 for entry in log[::2])
    assert max(entry["clip_share"] for entry in log[1::2]) > 0
    # Both steps of an episode tell of the same answers.
    assert [entry["reward"] for entry in log[::2]] == [entry["reward"] for entry in log[1::2]]


def test_a_rounded_sampler_is_corrected_for(start, tmp_path):
    config = settings(sampler={"quantize": "int4"}, episodes=2)
    _, log = run(start, tmp_path / "on", config)
    assert all(0.5 < entry["importance"] < 1.5 for entry in log)
    assert any(abs(entry["importance"] - 1) > 1e-6 for entry in log)
    _, log = run(start, tmp_path / "off", config.model_copy(update={"importance_cap": 0.0}))
    assert all("importance" not in entry for entry in log)


def test_a_prompt_beyond_the_window_is_left_out_and_counted(start, tmp_path):
    long = tmp_path / "long.jsonl"
    short = (start[0] / "prompts.jsonl").read_text()
    record = {"prompt": [{"role": "user", "content": "one " * 400}]}
    long.write_text(short + json.dumps(record) + "\n")
    place = Place(tmp_path / "out", tmp_path / "scratch", 1, "grpo")
    config = settings(episodes=1)
    metrics = grpo(config, start[0] / "model", long, start[1], place)
    assert (metrics["prompts"], metrics["too_long"]) == (8, 1)
    long.write_text(json.dumps(record) + "\n")
    with pytest.raises(OpenQwenError, match="1 are longer than 250 tokens"):
        grpo(config, start[0] / "model", long, start[1], place)


def test_every_token_has_the_version_of_its_weights(start, tmp_path):
    run(start, tmp_path)
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert {sample["step"] for sample in samples} == {0, 1, 2}
    for sample in samples:
        assert set(sample["versions"]) <= {sample["step"]}
        assert sample["prompt"].startswith("Say ")
    assert any(sample["versions"] for sample in samples)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"updates": 3}, "multiple of updates"),
        ({"sampler": {"url": "http://x/v1"}, "temperature": 0.7}, "temperature 1"),
        ({"rewards": {"sources": {}}}, "There is no reward"),
        ({"rewards": {"sources": {"gradr": 1}}}, "Did you mean 'grader'"),
        (
            {"rewards": {"sources": {"grader": 1}, "shaping": "qwen-math"}},
            "one reward model by one",
        ),
    ],
)
def test_settings_that_do_not_fit_are_named(start, tmp_path, fields, what):
    with pytest.raises((OpenQwenError, ValueError), match=what):
        run(start, tmp_path, settings(**fields))


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_adapters_are_trained_over_the_frozen_start(start, tmp_path, quantize):
    config = settings(
        lora={"rank": 2}, sampler={"quantize": quantize}, beta=0.1, save={"seconds": 0}
    )
    _, log = run(start, tmp_path / "whole", config)
    assert log[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert log[-1]["kl"] > 0
    found = load_model(tmp_path / "whole" / "out")
    expected = load_model(start[0] / "model")
    before = {n: p.clone() for n, p in expected.named_parameters()}
    load_adapter(expected, tmp_path / "whole" / "out" / "adapter")
    merge_adapters(expected)
    for name, parameter in found.named_parameters():
        assert_close(parameter, dict(expected.named_parameters())[name], rtol=0, atol=1e-6)
        changed = any(f".{target}.weight" in name for target in config.lora.targets)
        assert torch.equal(parameter, before[name]) != changed, name


def test_adapters_with_a_moving_reference_are_refused():
    with pytest.raises(ValueError, match="a reference that stays"):
        settings(lora={"rank": 2}, reference={"refresh": "copy"})


def test_problems_as_they_were_published_are_prompts(start, tmp_path):
    file = tmp_path / "gsm8k.jsonl"
    problems = [{"question": f"{n} + 1?", "answer": f"Add.\n#### {n + 1}"} for n in range(3)]
    file.write_text("".join(json.dumps(p) + "\n" for p in problems))
    place = Place(tmp_path / "out", tmp_path / "scratch", 1, "grpo")
    config = settings(form="gsm8k", system="Think.", rewards={"sources": ["grader"]})
    training = GrpoTraining(config, start[0] / "model", file, start[1], place, None)
    assert [record["grader"] for record in training.pool.records] == ["math"] * 3
    assert training.pool.records[1]["reference"]["answer"] == "2"
    assert training.pool.records[1]["prompt"][0] == {"role": "system", "content": "Think."}
    assert "Think." in start[1].decode(training.pool.ids[1])


def test_a_judge_that_is_not_named_is_an_error_before_anything_is_sampled(start, tmp_path):
    file = tmp_path / "tasks.jsonl"
    asked = [{"role": "user", "content": "Say one."}]
    task = {"id": "a", "prompt": asked, "grader": "judge", "reference": {"rubric": "Be good."}}
    file.write_text(json.dumps(task) + "\n")
    place = Place(tmp_path / "out", tmp_path / "scratch", 1, "grpo")
    config = settings(rewards={"sources": ["grader"]})
    with pytest.raises(OpenQwenError, match="needs the model 'judge'"):
        GrpoTraining(config, start[0] / "model", file, start[1], place, None)
