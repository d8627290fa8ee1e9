"""The `synthesize ratings` method: a model rates documents along several dimensions of quality.

Qwen2 and Qwen2.5 filter their corpora by such ratings (Qwen2 report, 3.1; Qwen2.5 report, 3.1). The
ratings of a few thousand documents train the classifier of `openqwen quality`, which rates the rest
(FineWeb-Edu's method). The prompt file says what each dimension means.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import Field

from openqwen.engine import Sampling
from openqwen.instruct.synthesize import reading
from openqwen.instruct.synthesize.config import SynthesisConfig
from openqwen.instruct.synthesize.inputs import documents
from openqwen.instruct.synthesize.method import Item, Method, Steps, Work
from openqwen.instruct.synthesize.runner import synthesize
from openqwen.support.stage import Stage, StageRun


class RatingsConfig(SynthesisConfig):
    """What is rated, and along which dimensions."""

    dimensions: list[str] = Field(
        ["education", "knowledge", "writing"],
        min_length=1,
        description="names of the dimensions, as the prompt file has them",
    )
    scale: int = Field(5, ge=1, description="the highest rating; the lowest is 0")
    characters: int = Field(3_000, ge=1, description="characters of a document that are shown")
    share: float = Field(1.0, gt=0, le=1, description="share of the documents, by hash of the id")


class Ratings(Method):
    """One item a document."""

    name = "ratings"
    files = ("ratings",)

    def __init__(self, config: RatingsConfig, source: Path):
        super().__init__(config)
        self.source = source

    def items(self) -> Iterable[Item]:
        """The documents that are rated, in their order."""
        for document in documents(self.source):
            digest = hashlib.sha256(document["id"].encode("utf-8", "replace")).digest()
            if int.from_bytes(digest[:4], "big") < self.config.share * 2**32:
                fault = "" if document["text"].strip() else "the document is empty"
                yield Item(document["id"], document["text"], fault)

    def steps(self, item: Item, work: Work) -> Steps[None]:
        """Ask for the ratings of a document, as JSON."""
        text = item.data[: self.config.characters]
        names = self.config.dimensions
        prompt = work.messages("rate", text=text, dimensions=names, scale=self.config.scale)
        sampling = Sampling(max_tokens=16 * len(names) + 64)
        (output,) = yield from work.ask([prompt], sampling)
        value = reading.json_value(output.text)
        given = value if isinstance(value, dict) else {}
        scores: dict[str, Any] = {name: given.get(name) for name in names} if given else {}
        fault = self._fault(scores)
        if work.gate("rated", not fault, fault, output.text):
            numbers = {name: float(number) for name, number in scores.items()}
            work.record("ratings", {"id": item.id, "text": item.data, "scores": numbers})

    def _fault(self, scores: dict[str, Any]) -> str:
        if not scores:
            return "no JSON object"
        for name, number in scores.items():
            if isinstance(number, bool) or not isinstance(number, int | float):
                return f"no number for {name}"
            if not 0 <= number <= self.config.scale:
                return f"{name} is not on the scale"
        return ""


def run_ratings(run: StageRun) -> dict[str, float]:
    """Documents → their ratings."""
    return synthesize(Ratings(run.config, run.inputs["documents"]), run)


STAGE = Stage(
    name="synthesize-ratings",
    help="A model rates documents; `openqwen quality` learns from the ratings.",
    config=RatingsConfig,
    inputs={"documents": "A folder or a file of documents: text, Markdown, HTML, JSONL, Parquet."},
    outputs=["ratings"],
    run=run_ratings,
)
