"""The engine's settings."""

from typing import Literal

from pydantic import ConfigDict, Field

from openqwen.support.settings import Settings


class EngineConfig(Settings):
    """Limits of the engine's memory and work.

    Only max_context, grow and an int8 cache change the distribution of an answer.
    """

    model_config = ConfigDict(frozen=True)

    cache_bytes: int | None = Field(
        None,
        gt=0,
        description="memory for keys and values; by default 1 GiB, or one sequence of max_context "
        "if that is more",
    )
    cache: Literal["float", "int8"] = Field(
        "float",
        description="numbers of the cached keys and values: as the network computes them, or "
        "rounded to 8 bits",
    )
    page_size: int = Field(16, gt=0, description="tokens of one cache page")
    max_running: int = Field(128, gt=0, description="most requests that run at once")
    token_budget: int | None = Field(
        None,
        gt=0,
        description="most tokens of one forward call; by default 256 on a CPU, 4096 elsewhere",
    )
    prefix_cache: bool = Field(
        True, description="let requests reuse the cache pages of earlier ones with the same prefix"
    )
    speculate: int = Field(
        0, ge=0, description="most draft tokens that one call verifies; 0 drafts none"
    )
    draft_below: int = Field(
        4, ge=0, description="draft only while at most this many requests are decoding"
    )
    max_context: int | None = Field(
        None,
        gt=1,
        description="most tokens of prompt and answer; by default the model's configuration "
        "decides. If it is given, each request is stretched (YARN, Dual Chunk Attention) no "
        "further than its own length needs",
    )
    grow: bool = Field(
        False,
        description="read every sequence under the RoPE scaling of its length so far, and rotate "
        "the cached keys when it outgrows one: then no part of a conversation is computed twice",
    )
