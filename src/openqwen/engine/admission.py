"""What may come in: prompts as ids, and how long they may be and are read."""

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
    """Ids that end an answer: all that the checkpoint states; Qwen2's two where it states none."""
    stated = set(config.stops)
    if tokenizer.stated_eos_id is not None:
        stated.add(tokenizer.stated_eos_id)
    known = {i for i in stated if i < tokenizer.vocab_size}
    return known or {tokenizer.eos_id, tokenizer.endoftext_id}


class Admission:
    """context: tokens of one sequence, at most; those that the cache's memory can hold may be fewer
    (`longest`).
    """

    def __init__(self, model: Qwen2, tokenizer: Tokenizer, config: EngineConfig):
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self.context = config.max_context or stated_context(model.config)
        # Fewer pages than all that run could ever fill, and at least one whole sequence, unless
        # told otherwise.
        one = -(-self.context // config.page_size)
        size = Cache.bytes_per_page(model.config, config.page_size, config.cache, model.dtype)
        count = config.cache_bytes // size if config.cache_bytes else max(one, _CACHE_BYTES // size)
        self.pages = max(1, min(count, config.max_running * one))
        self.longest = min(self.context, self.pages * config.page_size)
        chosen = config.max_context is not None or model.config.dual_chunk is not None
        self._stages = (
            stages(model.config, self.context) if chosen else [ContextStep(self.context, None)]
        )

    def ids(self, prompt: Prompt, most: int) -> list[int]:
        """A prompt's ids, at most so many.

        OpenQwenError where they are none, too many or not the model's.
        """
        if isinstance(prompt, str):
            ids = self._tokenizer.encode(prompt)
        elif prompt and not isinstance(prompt[0], int):
            ids = self._tokenizer.encode_chat(as_messages(prompt), add_generation_prompt=True)[0]
        else:
            ids = list(cast(Sequence[int], prompt))
        if not 1 <= len(ids) <= most:
            raise OpenQwenError(
                f"A prompt has {len(ids)} tokens; 1 to {most} are possible here.",
                where="prompt",
                do="shorten it, or raise the engine's max_context and cache_bytes",
            )
        size = self._model.config.vocab_size
        if wrong := [i for i in (min(ids), max(ids)) if not 0 <= i < size]:
            raise OpenQwenError(
                f"A prompt holds the id {wrong[0]}.",
                where="prompt",
                do=f"use ids of 0 to {size - 1}",
            )
        return ids

    def stages(self, sampling: Sampling, prompt: int) -> tuple[int, list[ContextStep]]:
        """The tokens that a sequence may come to hold, and how it is read on its way there.

        In one way, the first that covers the most that it may hold. Where the request sets no such
        limit, in the first that covers the prompt, and in the next ones where the answer outgrows
        it. With `grow`, from the first way on.
        """
        most, ways = self.longest, self._stages
        if sampling.max_tokens is not None:
            most = min(prompt + sampling.max_tokens, most)
        if sampling.long_context:
            return most, [ContextStep(most, sampling.long_context)]
        if not self._config.grow:
            needed = prompt if sampling.max_tokens is None else most
            ways = [stage for stage in ways if stage.until >= needed]
            ways = ways if sampling.max_tokens is None else ways[:1]
        return most, ways
