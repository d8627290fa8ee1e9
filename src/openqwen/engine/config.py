"""The engine's settings."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class EngineConfig(BaseModel):
    """How much the engine holds and does at once. No setting changes a request's distribution."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cache_bytes: int | None = Field(
        None,
        gt=0,
        description=(
            "memory for keys and values; by default 1 GiB, or one sequence of max_context if more"
        ),
    )
    cache: Literal["float", "int8"] = Field(
        "float",
        description=(
            "how keys and values are kept: as the network computes them, or rounded to 8 bits"
        ),
    )
    page_size: int = Field(16, gt=0, description="tokens of one page of the cache")
    max_running: int = Field(128, gt=0, description="requests at work at once, at most")
    token_budget: int | None = Field(
        None,
        gt=0,
        description="tokens of one forward call, at most; by default 256 on a CPU, 4096 elsewhere",
    )
    prefix_cache: bool = Field(
        True, description="let later requests reuse the pages of those that began alike"
    )
    speculate: int = Field(
        0, ge=0, description="most tokens to draft ahead and check in one call; 0 drafts none"
    )
    draft_below: int = Field(
        4, ge=0, description="draft only while no more requests than this are decoding"
    )
    max_context: int | None = Field(
        None,
        gt=1,
        description="tokens of prompt and answer, at most; by default as the model's configuration "
        "says. Where it is "
        "given, each request is stretched (YARN, Dual Chunk Attention) no further than its own "
        "length needs",
    )
    grow: bool = Field(
        False,
        description="beyond the trained window read every sequence as it grows, each part in the "
        "way of its length, "
        "with the keys of what came before turned anew: then no conversation is ever read twice",
    )
