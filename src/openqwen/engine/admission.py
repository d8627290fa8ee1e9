"""What may come in: prompts as ids, and how long they may be and are read."""

from collections.abc import Sequence
from typing import cast

from openqwen.engine.config import EngineConfig
from openqwen.engine.pages import PagePool
from openqwen.engine.request import Prompt, Sampling
from openqwen.model import Cache, LongContext, Qwen2
from openqwen.model.long_context import profile, stated_context
from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer import Tokenizer

_CACHE_BYTES = 2**30


class Admission:
    """context: tokens of one sequence, at most; those that the cache's memory can hold may be fewer (`longest`)."""

    def __init__(self, model: Qwen2, tokenizer: Tokenizer, config: EngineConfig):
        self._model, self._tokenizer, self._config = model, tokenizer, config
        self.context = config.max_context or stated_context(model.config)
        # Fewer pages than all that run could ever fill, and at least one whole sequence, unless told otherwise.
        one = -(-self.context // config.page_size)
        size = Cache.bytes_per_page(model.config, config.page_size, config.cache, model.dtype)
        count = config.cache_bytes // size if config.cache_bytes else max(one, _CACHE_BYTES // size)
        self.pages = max(1, min(count, config.max_running * one))
        self.longest = min(self.context, self.pages * config.page_size)

    def pool(self) -> PagePool:
        """All pages, blank."""
        return PagePool(self.pages, self._config.page_size)

    def ids(self, prompt: Prompt, most: int) -> list[int]:
        """A prompt's ids, at most so many. OpenQwenError where they are none, too many or not the model's."""
        if isinstance(prompt, str):
            ids = self._tokenizer.encode(prompt)
        elif prompt and not isinstance(prompt[0], int):
            ids = self._tokenizer.encode_chat(cast(list, prompt), add_generation_prompt=True)[0]
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
            raise OpenQwenError(f"A prompt holds the id {wrong[0]}.", where="prompt", do=f"use ids of 0 to {size - 1}")
        return ids

    def long_context(self, sampling: Sampling, tokens: int) -> LongContext | None:
        """How a sequence of at most so many tokens is read; None: as the model's configuration says.

        The scale of Dual Chunk Attention is settled here: what is cached must be what would be read anew.
        """
        if sampling.long_context or (self._config.max_context is None and self._model.config.dual_chunk is None):
            return sampling.long_context
        return profile(self._model.config, tokens, self.context)
