"""A stage that makes a text, in milliseconds."""

from pathlib import Path

from fake_log import log_run
from pydantic import BaseModel, ConfigDict, Field

from openqwen.support.stage import Effort, Stage, StageRun


class Corpus(BaseModel):
    """The text."""

    model_config = ConfigDict(extra="forbid")
    folder: Path | None = Field(None, description="A folder of text.")
    words: int = Field(100, gt=0, description="How many words.")
    weights: dict[str, float] = Field({"prose": 1.0}, description="Weight of each source.")


def run_corpus(run: StageRun) -> dict[str, float]:
    log_run(run)
    (run.output / "sub").mkdir()
    (run.output / "sub" / "text.txt").write_text("word " * run.config.words)
    return {"words": run.config.words}


STAGE = Stage(
    name="corpus",
    help="The text.",
    config=Corpus,
    inputs={},
    outputs=["corpus", "text"],
    run=run_corpus,
    estimate=lambda recipe, roles: Effort(seconds=3.0),
)
