"""Counter-based random numbers: each draw is a function of a seed and a position only."""

from collections.abc import Sequence

import numpy as np

from openqwen.support.splitmix import GAMMA, mix

_GAMMA = np.uint64(GAMMA)


def draws(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """Uniform numbers in [0, 1), one for each pair of a seed and a position; float64.

    SplitMix64 (Steele et al. 2014): the first output for the seed is the start state of a stream,
    and the position counts its outputs.
    """
    keys = _split_mix(np.array([seed & (2**64 - 1) for seed in seeds], np.uint64))
    words = _split_mix(keys + np.array(positions, np.uint64) * _GAMMA)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def seed_of(seed: int, index: int) -> int:
    """The seed of one of several answers (samples of a prompt, prompts of a call).

    The first has the given seed, so it is the answer that a single request gets.
    """
    if index == 0:
        return seed
    state = (seed + 0x632BE59BD9B4E019 * index) & (2**64 - 1)
    return int(_split_mix(np.array([state], np.uint64))[0])


def _split_mix(state: np.ndarray) -> np.ndarray:
    """SplitMix64's output after each state.

    The constant is added first, since mixing alone maps 0 to 0.
    """
    return mix(state + _GAMMA)
