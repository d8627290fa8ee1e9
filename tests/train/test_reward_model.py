"""The reward model's loss against closed forms, and what it reads from records."""

import json
import math
import os
import subprocess
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from openqwen.engine.score import RewardModel, criteria_scores
from openqwen.model import ModelConfig, Packed, Qwen2, Scorer, initialize, save_checkpoint
from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer import TokenizerConfig, train_tokenizer
from openqwen.tokenizer.answers import encode_answer
from openqwen.train import losses
from openqwen.train.comparisons import ComparedAnswers, Comparison, Comparisons, judgements
from openqwen.train.reward import RewardConfig, ScoredAnswers, reward
from openqwen.train.trainer import Place

CRITERIA = {"truthfulness": 1.0, "conciseness": 0.5, "harmlessness": 2.0}


def doubles(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


def scorer_of(criteria=None, seed=0):
    scorer = Scorer(ModelConfig(96, 32, 48, 2, 4, 2, max_position_embeddings=64), criteria)
    initialize(scorer, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for p in scorer.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + 1)) * 0.2)
    return scorer


def groups_of(count, criteria=(-1,), answers=4, seed=3):
    """Prompts with several answers, of which the first two are better than the others."""
    rng = np.random.default_rng(seed)
    groups = []
    for _ in range(count):
        prompt, *texts = (
            rng.integers(0, 96, int(rng.integers(2, 9))).tolist() for _ in range(answers + 1)
        )
        compared = [
            Comparison(i, j, criterion, float(rng.integers(0, 3)) / 4)
            for i, j in product((0, 1), range(2, answers))
            for criterion in criteria
        ]
        groups.append(ComparedAnswers(prompt, texts, [], compared))
    return groups


def test_pairs_with_margins_are_the_closed_form_in_float64():
    chosen, rejected, margins = doubles(7), doubles(7, seed=1), doubles(7, seed=2).detach().abs()
    loss = losses.reward(chosen, rejected, margins, center=0.25)
    expected = sum(
        math.log1p(math.exp(-(c - r - m))) + 0.25 * (c + r) ** 2
        for c, r, m in zip(chosen.tolist(), rejected.tolist(), margins.tolist())
    )
    assert loss.sum.item() == pytest.approx(expected, rel=1e-14)
    assert loss.count == 7
    loss.sum.backward()
    gap = (chosen - rejected - margins).detach()
    assert_close(chosen.grad, torch.sigmoid(gap) - 1 + 0.5 * (chosen + rejected).detach())
    assert loss.extras["accuracy"] == sum(c > r for c, r in zip(chosen.tolist(), rejected.tolist()))


@pytest.mark.skipif("OPENQWEN_TRL" not in os.environ, reason="no Python with TRL is named")
@pytest.mark.parametrize("center", [None, 0.01])
@pytest.mark.parametrize("with_margins", [False, True])
def test_loss_and_gradient_equal_trls_in_float64(with_margins, center):
    """OPENQWEN_TRL: the Python of an environment with trl 1.16."""
    chosen, rejected = doubles(9), doubles(9, seed=1)
    margins = doubles(9, seed=2).detach().abs() if with_margins else None
    given = {"chosen": chosen.tolist(), "rejected": rejected.tolist(), "center": center}
    given["margins"] = margins.tolist() if with_margins else None
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [os.environ["OPENQWEN_TRL"], Path(__file__).with_name("trl_reward.py")]
    done = subprocess.run(
        command, input=json.dumps(given), capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    loss = losses.reward(chosen, rejected, 0.0 if margins is None else margins, None, center or 0.0)
    mean = loss.sum / loss.count
    mean.backward()
    assert mean.item() == pytest.approx(theirs["loss"], abs=1e-12)
    gradient = torch.cat([chosen.grad, rejected.grad])
    assert gradient.tolist() == pytest.approx(theirs["gradient"], abs=1e-12)
    for name in ("accuracy", "margin"):
        assert loss.extras[name] / loss.count == pytest.approx(theirs["metrics"][name], abs=1e-6)


@pytest.mark.parametrize("good", [1, 2, 5])
def test_a_list_is_qwens_listwise_form_in_float64(good):
    """−1/(k(n − k)) Σ log σ(r⁺ − r⁻), of two lists of six answers."""
    scores = doubles(2, 6)
    pairs = list(product(range(good), range(good, 6)))
    chosen = torch.cat([torch.stack([row[i] for i, _ in pairs]) for row in scores])
    rejected = torch.cat([torch.stack([row[j] for _, j in pairs]) for row in scores])
    lists = torch.tensor([0] * len(pairs) + [1] * len(pairs))
    loss = losses.reward(chosen, rejected, lists_P=lists)
    expected = sum(
        -torch.nn.functional.logsigmoid(row[i] - row[j]) / (good * (6 - good))
        for row in scores
        for i, j in pairs
    )
    assert loss.count == 2
    assert_close(loss.sum, expected, rtol=1e-14, atol=0)
    ours = torch.autograd.grad(loss.sum, scores, retain_graph=True)[0]
    assert_close(ours, torch.autograd.grad(expected, scores)[0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("listwise", [False, True])
def test_packed_answers_have_the_loss_of_separate_sequences(listwise):
    """Every head at the last token of each answer, and the weighted sum for the reward."""
    scorer, groups = scorer_of(CRITERIA), groups_of(3, criteria=(-1, 0, 2))
    loss = ScoredAnswers.of(groups, torch.device("cpu")).loss(scorer, listwise)
    loss.sum.backward()
    separate, expected, count = scorer_of(CRITERIA).double(), 0.0, 0
    for group in groups:
        scores = []
        for answer in group.answers:
            ids = torch.tensor(group.prompt + answer)
            one = Packed.from_lengths([len(ids)])
            last = torch.tensor([len(ids) - 1])
            scores.append(separate(ids, one.positions, one, last)[0])
        for criterion in (-1, 0, 2):
            weights = (
                list(CRITERIA.values()) if criterion < 0 else [criterion == n for n in range(3)]
            )
            weights = torch.tensor(weights, dtype=torch.float64)
            terms = [
                torch.log1p(torch.exp(c.margin - (scores[c.chosen] - scores[c.rejected]) @ weights))
                for c in group.comparisons
                if c.criterion == criterion
            ]
            expected = expected + (sum(terms) / len(terms) if listwise else sum(terms))
            count += 1 if listwise else len(terms)
    expected.backward()
    assert loss.count == count
    assert loss.sum.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, ours), theirs in zip(scorer.named_parameters(), separate.parameters()):
        assert (ours.grad - theirs.grad).abs().max() <= 1e-4 * theirs.grad.abs().max(), name


@pytest.mark.parametrize("listwise", [False, True])
def test_sum_and_count_do_not_depend_on_the_cut(listwise):
    scorer, groups = scorer_of(CRITERIA), groups_of(5, criteria=(-1, 1))
    device = torch.device("cpu")
    whole = ScoredAnswers.of(groups, device).loss(scorer, listwise)
    parts = [ScoredAnswers.of(groups[a:b], device) for a, b in ((0, 1), (1, 4), (4, 5))]
    cut = [part.loss(scorer, listwise) for part in parts]
    assert sum(part.count for part in cut) == whole.count
    assert sum(part.sum.item() for part in cut) == pytest.approx(whole.sum.item(), rel=1e-5)
    for name, value in whole.extras.items():
        assert sum(part.extras[name] for part in cut) == pytest.approx(value, rel=1e-5), name


def test_the_last_state_is_read_once_for_all_criteria():
    scorer, rows = scorer_of(CRITERIA), []
    scorer.score.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape))
    answers = ScoredAnswers.of(groups_of(2, criteria=(-1, 0, 1, 2)), torch.device("cpu"))
    answers.loss(scorer)
    assert rows == [(8, 32)]  # one row for each answer


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({}, [(-1, 0, 0.0)]),
        ({"margin": 0.5}, [(-1, 0, 0.5)]),
        ({"criteria": {"conciseness": -1}}, [(-1, 0, 0.0), (1, 1, 0.0)]),
        ({"criteria": {"conciseness": "rejected"}}, [(-1, 0, 0.0), (1, 1, 0.0)]),
        ({"criteria": {"overall": 0, "truthfulness": 2}}, [(0, 0, 0.0)]),
        ({"criteria": {"overall": "tie"}}, []),
        (
            {"criteria": {"truthfulness": 1}, "margin": {"truthfulness": 2, "overall": 1}},
            [(-1, 0, 1.0), (0, 0, 2.0)],
        ),
    ],
)
def test_what_a_record_says(record, expected):
    assert judgements(record, CRITERIA, "here") == expected


@pytest.mark.parametrize(
    ("record", "what"),
    [
        ({"criteria": {"truthfullness": 1}}, "no criterion 'truthfullness'. Did you mean 'truthf"),
        ({"criteria": {"truthfulness": "better"}}, "This is 'better', not a number"),
        ({"criteria": {"truthfulness": True}}, "This is True, not a number"),
        ({"criteria": ["truthfulness"]}, "'criteria' is"),
        ({"margin": "wide"}, "This is 'wide', not a number"),
        ({"margin": math.nan}, "This is nan, not a number"),
    ],
)
def test_what_a_record_must_not_say(record, what):
    with pytest.raises(OpenQwenError, match=what) as error:
        judgements(record, CRITERIA, "here")
    assert "here" in str(error.value)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A small language model."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = train_tokenizer(["one two three good bad"] * 9, TokenizerConfig(vocabulary=300))
    model = Qwen2(ModelConfig(384, 32, 48, 2, 4, 2, max_position_embeddings=128))
    initialize(model, torch.Generator().manual_seed(1))
    save_checkpoint(model, tokenizer, folder)
    return folder, tokenizer


def read(records, start, tmp_path, criteria=()):
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    place = Place(tmp_path / "out", tmp_path / "scratch", seed=1, label="reward")
    return Comparisons.of(path, start[1], RewardConfig(), criteria, 128, place)


def test_pairs_and_lists_of_one_prompt_are_one_group(start, tmp_path):
    records = [
        {"prompt": "one", "chosen": "good", "rejected": "bad", "margin": 0.5},
        {"prompt": "two", "chosen": "good", "rejected": "bad"},
        # RewardBench 2's form, and lists of messages
        {"prompt": "one", "chosen": ["good", "three"], "rejected": ["bad", "two", "one"]},
        {
            "prompt": [{"role": "user", "content": "two"}],
            "chosen": [[{"role": "assistant", "content": "three"}]],
            "rejected": [{"role": "assistant", "content": "bad"}],
        },
        {"prompt": "one", "chosen": "good", "rejected": "good"},
    ]
    data = read(records, start, tmp_path)
    assert [len(group.answers) for group in data] == [5, 3]
    assert [(c.chosen, c.rejected, c.margin) for c in data[1].comparisons] == [
        (0, 1, 0.0),
        (2, 1, 0.0),
    ]
    first = data[0]
    texts = [start[1].decode(answer).replace("<|im_end|>", "") for answer in first.answers]
    assert Counter((texts[c.chosen], texts[c.rejected], c.margin) for c in first.comparisons) == {
        ("good", "bad", 0.5): 1,
        **dict.fromkeys(product(["good", "three"], ["bad", "two", "one"], [0.0]), 1),
    }
    assert data.counts == {"pairs": 8, "prompts": 2, "too_long": 0, "equal": 1, "undecided": 0}


def test_criteria_of_records(start, tmp_path, capsys):
    record = {"prompt": "one", "chosen": "good", "rejected": "bad"}
    records = [record | {"criteria": {"a": 1, "b": -1}}, record | {"criteria": {"overall": 0}}]
    data = read(records, start, tmp_path, criteria=["a", "b"])
    assert data[0].comparisons == [(0, 1, -1, 0.0), (0, 1, 0, 0.0), (1, 0, 1, 0.0)]
    assert data.counts["undecided"] == 1
    assert len(read(records, start, tmp_path)[0].comparisons) == 1
    assert "the criteria of 2 records are not read" in capsys.readouterr().err


def test_nothing_to_compare(start, tmp_path):
    same = {"prompt": "one", "chosen": "good", "rejected": "good"}
    with pytest.raises(OpenQwenError, match="None of the 1 records compares two different answers"):
        read([same], start, tmp_path)
    lists = {"chosen": ["one good", "two good"], "rejected": ["one bad", "two bad"]}
    with pytest.raises(OpenQwenError, match="do not begin alike"):
        read([lists], start, tmp_path)


def test_criteria_that_contradict_each_other_are_learned_apart(start, tmp_path):
    """One head prefers what the other rejects; the reward is their weighted sum."""
    words = ("one", "two", "three")
    records = [
        {
            "prompt": f"{a} {b}",
            "chosen": "good " + c,
            "rejected": "bad " + c,
            "criteria": {"helpfulness": 1, "conciseness": -1, "overall": 0},
        }
        for a, b, c in product(words, words, words)
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    train = {"learning_rate": 5e-3}
    config = RewardConfig(
        criteria={"helpfulness": 1.0, "conciseness": 3.0}, epochs=12, batch=9, train=train
    )
    place = Place(tmp_path / "out", tmp_path / "scratch", seed=1, label="reward")
    metrics = reward(config, start[0], path, start[1], place)
    assert metrics["accuracy"] == 1.0
    model = RewardModel.load(tmp_path / "out")
    talks = [
        [{"role": "user", "content": "two one"}, {"role": "assistant", "content": text}]
        for text in ("good two", "bad two")
    ]
    ids = [encode_answer(model.tokenizer, talk[:-1], talk[-1])[0] for talk in talks]
    good, bad = criteria_scores(model.scorer, ids).tolist()
    assert good[0] > bad[0]
    assert good[1] < bad[1]
    assert model.score(talks) == pytest.approx([x + 3 * y for x, y in (good, bad)], rel=1e-4)
    assert model.score(talks)[0] < model.score(talks)[1]


def test_overall_is_no_criterion(start, tmp_path):
    place = Place(tmp_path / "out", tmp_path / "scratch", seed=1, label="reward")
    with pytest.raises(OpenQwenError, match="'overall' is no criterion"):
        reward(RewardConfig(criteria={"overall": 1.0}), start[0], tmp_path, start[1], place)
