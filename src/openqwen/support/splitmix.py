"""SplitMix64 (Steele et al. 2014): the mixing behind hashes and counter-based random numbers."""

import numpy as np

GAMMA = 0x9E3779B97F4A7C15  # the step between two states; odd


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser, elementwise on uint64: a bijection that spreads every bit over all 64.

    It maps 0 to 0. SplitMix64's output for a state is `mix(state + GAMMA)`.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
