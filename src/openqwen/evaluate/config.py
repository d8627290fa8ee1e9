"""The sizes of an evaluation."""

from pathlib import Path

from pydantic import Field

from openqwen.support.settings import Settings


class EvaluateConfig(Settings):
    """Sizes of the evaluation; every stage of a recipe is measured on the same tasks and texts."""

    context: int = Field(512, ge=2, description="window for bits per byte, in tokens")
    heldout_bytes: int = Field(
        400_000,
        ge=1,
        description="held-out text to score, in UTF-8 bytes; sources get equal shares",
    )
    checked: int = Field(
        680, ge=1, description="checkable tasks of the development split, all kinds equally often"
    )
    test: int = Field(
        1_700, ge=2, description="checkable tasks of the test split, for the chat models"
    )
    max_tokens: int = Field(32, ge=1, description="longest answer to a checkable task, in tokens")
    sample_tokens: int = Field(
        48, ge=1, description="longest sample shown in the report, in tokens"
    )
    tasks: str = Field(
        "", description="benchmarks or suites to score too, with commas between them (--list)"
    )
    data: Path | None = Field(None, description="folder with the files of these benchmarks")
    limit: int | None = Field(None, ge=1, description="questions of each benchmark; none: all")
