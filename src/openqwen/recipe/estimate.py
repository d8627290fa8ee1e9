"""How long each stage should take, before it has ever run: arithmetic over measured speed. For `--dry-run`."""

import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel

from openqwen.model import ModelConfig

if TYPE_CHECKING:
    from openqwen.recipe.stages import Recipe

_SHARE = 0.6  # of the matrix peak that training a small model reaches
_CONVERSATION = 45  # tokens of a short conversation
_TEXT_SPEED = 3e6  # bytes of raw text read, cleaned, filtered and deduplicated a second
_BPE_SPEED = 3e6  # bytes of text a second, to learn a vocabulary from or to encode
_COMPARED = 40  # tokens of a prompt with its compared answers; not every prompt has a right and a wrong one
_ANSWERS = 250  # short answers a second
_SCORED = 0.25  # of a training token: a byte scored is a third of a token, read twice, forward only
_CHATS = ("evaluate-sft", "evaluate-dpo", "evaluate-online-dpo")


@cache
def _flops() -> float:
    """Float32 operations a second of one large matrix product, on this machine."""
    size = 1_024
    a, b = torch.randn(size, size), torch.randn(size, size)
    a @ b
    start = time.perf_counter()
    for _ in range(4):
        a @ b
    return 4 * 2 * size**3 / (time.perf_counter() - start)


class Estimates:
    """Seconds for each stage of one recipe."""

    def __init__(self, recipe: "Recipe"):
        self.recipe = recipe

    def of(self, stage: str) -> Callable[[BaseModel], float]:
        """The estimate of one stage, worked out when it is asked for."""
        return lambda _: self._seconds(stage)

    def _seconds(self, stage: str) -> float:
        r = self.recipe
        text = min(sum(r.corpus.max_bytes.values()), 10**9)
        if stage == "corpus":
            return text / _TEXT_SPEED
        if stage in ("tokenizer", "tokens"):
            return min(text, r.tokenizer.max_bytes) / _BPE_SPEED
        if stage.startswith("evaluate"):
            answers = r.evaluate.checked + (r.evaluate.test if stage in _CHATS else 0)
            return 2 * answers / _ANSWERS + self._training(_SCORED * r.evaluate.heldout_bytes)
        sampled = {
            "instruct": r.instruct.rejection_prompts * r.instruct.rejection_samples,
            "prefer": (r.prefer.prompts + 2 * r.prefer.heldout_prompts) * r.prefer.samples,
            "online-dpo": r.online_dpo.steps * r.online_dpo.batch * r.online_dpo.samples,
        }
        compared = r.prefer.prompts * _COMPARED
        trained = {
            "pretrain": r.pretrain.data.tokens,
            "extend": r.extend.data.tokens,
            "sft": (r.instruct.demonstrations + r.instruct.repurposed) * r.sft.epochs * _CONVERSATION,
            "reward": compared * r.reward.epochs,
            "dpo": compared * (r.dpo.epochs + 1 / 3),
            "online-dpo": r.online_dpo.steps * r.online_dpo.batch * _COMPARED,
        }
        return sampled.get(stage, 0) / _ANSWERS + self._training(trained.get(stage, 0))

    def _training(self, tokens: float) -> float:
        size = self.recipe.pretrain.network
        config = ModelConfig(
            vocab_size=self.recipe.tokenizer.vocabulary,
            hidden_size=size.hidden_size,
            intermediate_size=size.intermediate_size,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
        )
        return tokens * config.flops_per_token(self.recipe.pretrain.data.context / 2) / (_SHARE * _flops())
