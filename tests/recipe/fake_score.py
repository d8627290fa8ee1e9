"""A stage that scores, in milliseconds."""

from fake_log import log_run
from pydantic import BaseModel, ConfigDict, Field

from openqwen.support.stage import Stage, StageRun


class Score(BaseModel):
    """The scorer."""

    model_config = ConfigDict(extra="forbid")
    bytes: int = Field(10, ge=0, description="Size of the answer file.")


def run_score(run: StageRun) -> dict[str, float]:
    log_run(run)
    (run.output / "scores.bin").write_bytes(b"x" * run.config.bytes)
    return {"bits_per_byte": float("nan")}


STAGE = Stage(
    name="online-score",
    help="The scorer.",
    config=Score,
    inputs={"model": "What to score."},
    outputs=[],
    run=run_score,
)
