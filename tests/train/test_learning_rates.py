"""The schedules of the learning rate, by hand and against transformers."""

import pytest
import torch
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

from openqwen.train.optimizer import OptimizerConfig, learning_rate


def rates(steps, **config):
    config = OptimizerConfig(**{"learning_rate": 1.0, "warmup_share": 0.1, **config})
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_learning_rate_shapes():
    cosine = rates(101, final_share=0.1)
    assert cosine[0] == pytest.approx(1 / 11)
    assert max(cosine) == cosine[10] == 1.0
    assert cosine[55] == pytest.approx(0.1 + 0.9 * 0.5)
    stable = rates(101, final_share=0.0, schedule="wsd", decay_share=0.2)
    assert stable[10:81] == [1.0] * 71
    assert stable[90] == pytest.approx(0.5)
    linear = rates(101, warmup_share=0.0, final_share=0.0, schedule="linear")
    assert linear[75] == pytest.approx(0.25)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 500])
def test_the_last_step_has_the_final_share_and_the_peak_is_reached(schedule, warmup, steps):
    found = rates(steps, warmup_share=warmup, schedule=schedule, final_share=0.1, decay_share=1.0)
    after = steps > 1 + round(warmup * steps)
    assert found[-1] == pytest.approx(0.1 if after else 1.0)  # no step is left to fall in: the peak
    assert max(found) == 1.0


def test_a_schedule_is_that_of_transformers_whose_end_is_the_last_step():
    """transformers reaches the end behind the last step; so does it here with one step more."""
    weight = torch.nn.Parameter(torch.zeros(1))
    theirs = {
        "cosine": lambda o: get_cosine_with_min_lr_schedule_with_warmup(o, 0, 40, min_lr_rate=0.1),
        "wsd": lambda o: get_wsd_schedule(
            o, 0, 10, num_stable_steps=30, min_lr_ratio=0.1, decay_type="linear"
        ),
    }
    for schedule, make in theirs.items():
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scheduler, expected = make(optimizer), []
        for _ in range(41):
            expected.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
        ours = rates(41, warmup_share=0.0, schedule=schedule, final_share=0.1, decay_share=0.25)
        assert ours == pytest.approx(expected)
