"""How long each stage should take, before it has ever run: arithmetic over measured speed. For `--dry-run`."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import BaseModel

from openqwen.support.device import best_device, peak_flops
from openqwen.train.pretrain import network_config

if TYPE_CHECKING:
    from openqwen.recipe.stages import Recipe

SHARE = 0.6  # of the matrix peak that training a small model reaches
CONVERSATION = 45  # tokens of a short conversation
_TEXT_SPEED = 3e6  # bytes of raw text read, cleaned, filtered and deduplicated a second
_BPE_SPEED = 3e6  # bytes of text a second, to learn a vocabulary from or to encode
COMPARED = 40  # tokens of a prompt with its compared answers; not every prompt has a right and a wrong one
_ANSWERS = 250  # short answers a second
_SCORED = 0.25  # of a training token: a byte scored is a third of a token, read twice, forward only
_CHATS = ("evaluate-sft", "evaluate-dpo", "evaluate-online-dpo")


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
            answers = 2 * r.evaluate.checked + (3 * r.evaluate.test if stage in _CHATS else 0)
            return answers / _ANSWERS + self._training(_SCORED * r.evaluate.heldout_bytes)
        sampled = {
            "instruct": r.instruct.rejection_prompts * r.instruct.rejection_samples,
            "prefer": (r.prefer.prompts + 2 * r.prefer.heldout_prompts) * r.prefer.samples,
            "online-dpo": r.online_dpo.steps * r.online_dpo.batch * r.online_dpo.samples,
        }
        if stage in ("pretrain", "extend"):
            read = [part.data for part in getattr(r, stage).resolved()]
            return sum(self._training(data.tokens, data.row) for data in read)
        return sampled.get(stage, 0) / _ANSWERS + self._training(trained_tokens(r).get(stage, 0))

    def _training(self, tokens: float, context: int = CONVERSATION) -> float:
        config = network_config(self.recipe.pretrain, self.recipe.tokenizer.vocabulary)
        operations = tokens * config.flops_per_token(context / 2)
        return operations / (SHARE * peak_flops(best_device()))


def trained_tokens(r: "Recipe") -> dict[str, float]:
    """Tokens that each stage behind pre-training trains on."""
    compared = r.prefer.prompts * COMPARED
    return {
        "sft": (r.instruct.demonstrations + r.instruct.repurposed) * r.sft.epochs * CONVERSATION,
        "reward": compared * r.reward.epochs,
        "dpo": compared * (r.dpo.epochs + 1 / 3),
        "online-dpo": r.online_dpo.steps * r.online_dpo.batch * COMPARED,
    }
