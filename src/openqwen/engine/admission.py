"""Admission of requests: prompts as token ids, their limits, and how they are read."""

from collections.abc import Sequence
from typing import cast

from openqwen.engine.config import EngineConfig
from openqwen.engine.generator import Prompt, Sampling
from openqwen.model import Cache, ModelConfig, Qwen2
from openqwen.model.long_context import ContextStep, stages, stated_context
from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer import Tokenizer
from openqwen.tokenizer.messages import as_messages

_CACHE_BYTES = 2**30


def stop_ids(config: ModelConfig, tokenizer: Tokenizer) -> set[int]:
    """The ids that end an answer: all that the checkpoint states, or Qwen2's two."""
    stated = set(config.stops)
    if tokenizer.stated_eos_id is not None:
        stated.add(tokenizer.stated_eos_id)
    known = {i for i in stated if i < tokenizer.vocab_size}
    return known or {tokenizer.eos_id, tokenizer.endoftext_id}


class Admission:
    """Checks prompts, and decides how many cache pages there are.

    context: most tokens of one sequence. longest: the same, but no more than the pages hold.
    """

    def __init__(self, model: Qwen2, tokenizer: Tokenizer, config: EngineConfig):
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self.context = config.max_context or stated_context(model.config)
        # At least one sequence of the longest kind, unless cache_bytes says otherwise; never more
        # than the running requests can fill.
        sequence = -(-self.context // config.page_size)
        size = Cache.bytes_per_page(model.config, config.page_size, config.cache, model.dtype)
        count = max(sequence, _CACHE_BYTES // size)
        if config.cache_bytes:
            count = config.cache_bytes // size
        self.pages = max(1, min(count, config.max_running * sequence))
        self.longest = min(self.context, self.pages * config.page_size)
        self.scalings = [ContextStep(self.context, None)]
        if config.max_context is not None or model.config.dual_chunk is not None:
            self.scalings = stages(model.config, self.context)

    def token_ids(self, prompt: Prompt, most: int) -> list[int]:
        """The token ids of a prompt.

        Raises:
            OpenQwenError: there are none, more than `most`, or ids that the model does not have.
        """
        if isinstance(prompt, str):
            ids = self._tokenizer.encode(prompt)
        elif prompt and not isinstance(prompt[0], int):
            ids = self._tokenizer.encode_chat(as_messages(prompt), add_generation_prompt=True)[0]
        else:
            ids = list(cast(Sequence[int], prompt))
        if not 1 <= len(ids) <= most:
            raise OpenQwenError(
                f"A prompt has {len(ids)} tokens; it must have 1 to {most}.",
                where="prompt",
                do="shorten it, or raise the engine's max_context and cache_bytes"
                if ids
                else "give a text that is not empty",
            )
        size = self._model.config.vocab_size
        if wrong := [i for i in (min(ids), max(ids)) if not 0 <= i < size]:
            raise OpenQwenError(
                f"A prompt holds the id {wrong[0]}.",
                where="prompt",
                do=f"use ids of 0 to {size - 1}",
            )
        return ids

    def scalings_for(self, sampling: Sampling, prompt: int) -> tuple[int, list[ContextStep]]:
        """The most tokens of a sequence, and the RoPE scalings that it is read under, in order.

        There is one, the first that covers the most tokens. If the request sets no limit, there are
        the first that covers the prompt, and those after it, for an answer that outgrows it. With
        `grow` there are all.
        """
        most, scalings = self.longest, self.scalings
        if sampling.max_tokens is not None:
            most = min(prompt + sampling.max_tokens, most)
        if sampling.long_context:
            return most, [ContextStep(most, sampling.long_context)]
        if not self._config.grow:
            needed = prompt if sampling.max_tokens is None else most
            scalings = [scaling for scaling in scalings if scaling.until >= needed]
            scalings = scalings if sampling.max_tokens is None else scalings[:1]
        return most, scalings
