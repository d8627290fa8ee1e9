"""A stage like one that trains: it saves its state every few steps into scratch, and continues from
it.
"""

import hashlib
import json
import os
import time

from fake_log import log_run
from pydantic import BaseModel, ConfigDict, Field

from openqwen.support.files import write_json
from openqwen.support.stage import CHAT, Stage, StageRun


class Train(BaseModel):
    """The trainer."""

    model_config = ConfigDict(extra="forbid")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    steps: int = Field(20, gt=0, description="Optimizer steps.")
    pause: float = Field(0.0, ge=0, description="Seconds a step.")


class Learn(BaseModel):
    """The learner."""

    model_config = ConfigDict(extra="forbid")
    train: Train = Field(Train(), description="The trainer.")


def run_learn(run: StageRun) -> dict[str, float]:
    log_run(run)
    state = run.scratch / "state.json"
    text = (
        (run.inputs["corpus"] / "sub" / "text.txt").read_bytes()
        if run.inputs["corpus"].is_dir()
        else b"alone"
    )
    done, value = (
        json.loads(state.read_text()) if state.exists() else (0, hashlib.sha256(text).hexdigest())
    )
    for step in range(done, run.config.train.steps):
        value = hashlib.sha256(
            f"{value} {run.seed} {run.config.train.learning_rate}".encode()
        ).hexdigest()
        time.sleep(run.config.train.pause)
        if step % 3 == 0:
            write_json(state, [step + 1, value])
        if os.environ.get("FAKE_BUG"):
            raise RuntimeError("a bug")
    (run.output / "weights.txt").write_text(value)
    (run.output / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "seconds": time.time()}) + "\n"
    )
    return {"loss": 0.12345, "steps": run.config.train.steps}


STAGE = Stage(
    name="learn",
    help="Learn.",
    config=Learn,
    inputs={"corpus": "What to learn from."},
    outputs=["model", CHAT],
    run=run_learn,
)
