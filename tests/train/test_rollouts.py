"""Rollouts: seeds by step, graded answers in the order of the prompts, on any number of ranks."""

import json
from pathlib import Path

import pytest
from fake_generator import PROMPTS, rollouts
from test_parallel import start

from openqwen.engine import Output
from openqwen.support.generators import Generators
from openqwen.train.online_dpo import best_and_worst
from openqwen.train.parallel import World
from openqwen.train.rollouts import RolloutGroup

RANKS = Path(__file__).with_name("rollout_ranks.py")


def test_each_prompt_is_answered_often_with_seeds_of_the_step():
    made = rollouts(World())
    groups = made.step(4, [2, 0, 2])
    assert [group.prompt for group in groups] == [2, 0, 2]
    seeds = Generators(3)["sampling.4"].integers(0, 2**62, 15).tolist()
    asked = [PROMPTS[index] for index in (2, 0, 2) for _ in range(5)]
    assert made.generator.asked == [list(pair) for pair in zip(asked, seeds)]
    answers = [output.token_ids[-1] for group in groups for output in group.outputs]
    assert answers == [seed % 1000 for seed in seeds]
    for group in groups:
        sums = [sum(output.token_ids) for output in group.outputs]
        assert group.rewards == [group.prompt + total / 7 for total in sums]
    made.step(5, [2])
    assert made.generator.refreshed == [4, 5]
    assert not {seed for _, seed in made.generator.asked[15:]} & set(seeds)


def test_every_rank_gets_the_groups_of_one_process(tmp_path):
    start(1, RANKS, tmp_path)
    start(2, RANKS, tmp_path)
    one, *two = (
        json.loads((tmp_path / name).read_text())
        for name in ("0-of-1.json", "0-of-2.json", "1-of-2.json")
    )
    for rank, told in enumerate(two):
        assert told["rows"] == one["rows"]
        assert told["refreshed"] == [0, 1]
        # 15 requests a step: one rank has 8, the other 7.
        step = [one["asked"][:15][rank::2], one["asked"][15:][rank::2]]
        assert told["asked"] == step[0] + step[1]


def test_an_error_of_one_rank_is_raised_on_all(tmp_path):
    start(2, RANKS, tmp_path, 1)
    for rank in range(2):
        told = json.loads((tmp_path / f"{rank}-of-2.json").read_text())
        assert "no reward here" in told["error"]
        assert "somewhere" in told["error"]
        assert told["refreshed"] == [0]


def answer(*ids, finish="stop"):
    return Output(token_ids=list(ids), finish_reason=finish)


@pytest.mark.parametrize(
    ("outputs", "rewards", "vote", "pair"),
    [
        ([answer(1), answer(2), answer(3)], [0.1, 0.3, 0.2], False, (1, 0)),
        ([answer(1), answer(2, finish="length")], [0.1, 9.0], False, (0, 1)),
        ([answer(1, finish="length"), answer(2, finish="length")], [0.1, 9.0], False, None),
        ([answer(1), answer(1)], [0.1, 0.3], False, None),
        ([answer(1), answer(2), answer(1)], [0.1, 0.4, 0.1], False, (1, 0)),
        ([answer(1), answer(2), answer(1)], [0.1, 0.4, 0.1], True, (0, 1)),
    ],
)
def test_the_best_answer_has_stopped_and_differs_from_the_worst(outputs, rewards, vote, pair):
    found = best_and_worst(RolloutGroup(0, outputs, rewards), vote)
    assert found == (pair and tuple(outputs[n] for n in pair))
