"""Reward functions, called by name in a process of their own."""

import math
import os
import time


def likes_e(records, answers):
    """The share of the letter e."""
    return [answer.count("e") / max(len(answer), 1) for answer in answers]


def bad(records, answers):
    """By the record: no number, an exception, a hang, the end of the process, or a reward of 1."""
    rewards = []
    for record in records:
        kind = record.get("kind")
        if kind == "raises":
            raise ValueError("no reward for this")
        if kind == "hangs":
            time.sleep(60)
        if kind == "exits":
            os._exit(3)
        rewards.append({"nan": math.nan, "none": None}.get(kind, 1.0))
    return rewards


def too_few(records, answers):
    """A list that is too short."""
    return [1.0] * (len(answers) - 1)


def same(records, answers):
    """One reward for all."""
    return [0.5] * len(answers)
