"""Weights → scores: bits per byte, graded tasks, preference accuracy, win rates, samples."""

from openqwen.evaluate.bits_per_byte import BitsPerByte, bits_per_byte, within_budget
from openqwen.evaluate.checked import checked_accuracy
from openqwen.evaluate.config import EvaluateConfig
from openqwen.evaluate.intervals import paired_gain, wilson_interval
from openqwen.evaluate.preferences import near_misses, win_rate
from openqwen.evaluate.samples import CHATS, CONTINUATIONS, answer_samples

__all__ = [
    "CHATS",
    "CONTINUATIONS",
    "BitsPerByte",
    "EvaluateConfig",
    "answer_samples",
    "bits_per_byte",
    "checked_accuracy",
    "near_misses",
    "paired_gain",
    "wilson_interval",
    "win_rate",
    "within_budget",
]
