"""The `corpus` stage: raw documents, with the solved tasks that Qwen2 mixes into pre-training.

It is in this package, not in `corpus/`, because the documents of tasks are made here.
"""

from collections.abc import Collection
from typing import Any

from pydantic import Field

from openqwen.corpus import CorpusConfig, build_corpus
from openqwen.corpus.config import text_bytes
from openqwen.instruct.synthesize.pretraining_tasks import task_documents
from openqwen.support.stage import Effort, Stage, StageRun

_SPEED = 3e6  # bytes of raw text that are read, filtered and deduplicated in a second


class CorpusStageConfig(CorpusConfig):
    """The corpus, with the multi-task instruction data that is mixed in (Qwen2 report, 3.1)."""

    task_documents: int = Field(
        1_000, ge=0, description="documents of solved tasks, mixed in as the source 'tasks'"
    )


def run_corpus(run: StageRun) -> dict[str, float]:
    """Raw documents → train.parquet, heldout.parquet and corpus.json."""
    tasks = task_documents(run.seed, run.config.task_documents)
    return build_corpus(run.config, tasks, run.output, run.seed, run.scratch)


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
