"""A recipe of three stages in plain Python, milliseconds each; as a script it is `openqwen` with this recipe inside.

`learn` is like a training stage: it saves its state every few steps into scratch, and continues from it.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from openqwen import cli
from openqwen.recipe.stage import Stage, Verb, Work
from openqwen.support.files import write_json


class Corpus(BaseModel):
    """The text."""

    model_config = ConfigDict(extra="forbid")
    folder: Path | None = Field(None, description="A folder of text.")
    words: int = Field(100, gt=0, description="How many words.")
    weights: dict[str, float] = Field({"prose": 1.0}, description="Weight of each source.")


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


class Score(BaseModel):
    """The scorer."""

    model_config = ConfigDict(extra="forbid")
    bytes: int = Field(10, ge=0, description="Size of the answer file.")


class Recipe(BaseModel):
    """All of it."""

    model_config = ConfigDict(extra="forbid")
    seed: int = Field(0, description="Of every random draw.")
    corpus: Corpus = Field(Corpus(), description="The text.")
    learn: Learn = Field(Learn(), description="The learner.")
    online_score: Score = Field(Score(), description="The scorer.")


def run_corpus(work: Work) -> dict[str, float]:
    log_run(work)
    (work.output / "sub").mkdir()
    (work.output / "sub" / "text.txt").write_text("word " * work.config.words)
    return {"words": work.config.words}


def run_learn(work: Work) -> dict[str, float]:
    log_run(work)
    state = work.scratch / "state.json"
    text = (work.inputs["corpus"] / "sub" / "text.txt").read_bytes() if work.inputs["corpus"].is_dir() else b"alone"
    done, value = json.loads(state.read_text()) if state.exists() else (0, hashlib.sha256(text).hexdigest())
    for step in range(done, work.config.train.steps):
        value = hashlib.sha256(f"{value} {work.seed} {work.config.train.learning_rate}".encode()).hexdigest()
        time.sleep(work.config.train.pause)
        if step % 3 == 0:
            write_json(state, [step + 1, value])
        if os.environ.get("FAKE_BUG"):
            raise RuntimeError("a bug")
    (work.output / "weights.txt").write_text(value)
    (work.output / "metrics.jsonl").write_text(json.dumps({"step": 1, "seconds": time.time()}) + "\n")
    return {"loss": 0.12345, "steps": work.config.train.steps}


def run_score(work: Work) -> dict[str, float]:
    log_run(work)
    (work.output / "scores.bin").write_bytes(b"x" * work.config.bytes)
    return {"bits_per_byte": float("nan")}


def log_run(work: Work) -> None:
    """Tests ask which stages really ran."""
    if "FAKE_LOG" in os.environ:
        with open(os.environ["FAKE_LOG"], "a") as log:
            log.write(work.label + "\n")


def stages_of(recipe: Recipe) -> list[Stage]:
    outside = {"folder": recipe.corpus.folder} if recipe.corpus.folder else {}
    return [
        Stage("corpus", "corpus", recipe.corpus, run_corpus, outside=outside, estimate=lambda config: 3.0),
        Stage("learn", "learn", recipe.learn, run_learn, inputs={"corpus": "corpus"}),
        Stage("online-score", "score", recipe.online_score, run_score, inputs={"model": "learn", "text": "corpus"}),
    ]


def finish(folder: Path) -> list[str]:
    return [f"Report: {folder / 'report.html'}", f"Chat:   openqwen chat {folder / 'learn'}"]


VERBS = {"sft": Verb("Learn.", Learn, {"corpus": "What to learn from."}, run_learn)}

if __name__ == "__main__":
    sys.modules["openqwen.recipe.stages"] = sys.modules["__main__"]
    import openqwen.recipe

    openqwen.recipe.stages = sys.modules["__main__"]
    sys.exit(cli.main())
