import math

import pytest

from openqwen.train.online_dpo import votes


def test_equal_answers_share_one_weight_and_the_reward_decides_among_singles():
    answers = [[1, 2], [3], [1, 2], [4]]
    rewards = [-1.0, 2.0, 0.0, -3.0]
    sigma = [1 / (1 + math.exp(-r)) for r in rewards]
    pair = sigma[0] + sigma[2]
    assert votes(answers, rewards) == pytest.approx([pair, sigma[1], pair, sigma[3]])
    assert votes([[1], [2]], [0.3, 0.1])[0] > votes([[1], [2]], [0.3, 0.1])[1]
