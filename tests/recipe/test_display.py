from openqwen.recipe.display import _key_metrics


def test_an_interval_stands_behind_its_number_and_takes_no_place_of_its_own():
    metrics = {"bits_per_byte": 3.3403, "test_accuracy": 0.52}
    metrics |= {
        "test_accuracy_low": 0.496,
        "test_accuracy_high": 0.5435,
        "test_gain": -0.012,
        "win_rate": 0.5,
    }
    assert _key_metrics(metrics) == (
        "bits per byte 3.34   test accuracy 52.0% (49.6% to 54.4%)   test gain -1.2%   win "
        "rate 50.0%"
    )
