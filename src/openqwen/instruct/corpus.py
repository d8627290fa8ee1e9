"""The `corpus` stage: raw documents, and the tasks that Qwen2 mixes into pre-training.

It stands in this room, and not in `corpus/`, because the tasks are made here (Qwen2 report, 3.1).
"""

from collections.abc import Collection
from typing import Any

from pydantic import Field

from openqwen.corpus import CorpusConfig, build_corpus
from openqwen.corpus.config import text_bytes
from openqwen.instruct.synthesize.pretraining_tasks import task_documents
from openqwen.support.stage import Effort, Stage, StageRun

_SPEED = 3e6  # bytes of raw text read, cleaned, filtered and deduplicated a second


class CorpusStageConfig(CorpusConfig):
    """The corpus, and the multi-task instruction data that Qwen2 mixes into pre-training (Qwen2
    report, 3.1).
    """

    task_documents: int = Field(
        1_000, ge=0, description="documents of solved tasks mixed in, as the source 'tasks'"
    )


def run_corpus(run: StageRun) -> dict[str, float]:
    """Raw documents → train.parquet, heldout.parquet, corpus.json."""
    tasks = task_documents(run.seed, run.config.task_documents)
    return build_corpus(run.config, tasks, run.output, run.seed)


def _effort(recipe: Any, roles: Collection[str]) -> Effort:
    return Effort(seconds=text_bytes(recipe.corpus) / _SPEED)


STAGE = Stage(
    name="corpus",
    help="Raw documents to cleaned, filtered, deduplicated text.",
    config=CorpusStageConfig,
    inputs={},
    outputs=["corpus"],
    run=run_corpus,
    estimate=_effort,
)
