"""The `synthesize long` stage: long documents for the long-context phase, made without a model.

Natural long text mostly needs its last few thousand tokens to be predicted. Qwen2.5-1M therefore
adds text whose end depends on places far away (Qwen2.5-1M report, section 3.1):

    natural    the text as it is
    middle     a part is taken out and stands at the end (fill in the middle)
    keyword    the paragraphs with a rare word are repeated at the end
    neighbour  the paragraph that follows a given one is repeated at the end
    order      the parts are shuffled; their right order stands at the end

The functions are pure: the paragraphs of a text, a generator of random numbers and the wordings
give a text, or "" where the paragraphs do not allow it. documents.jsonl is for the corpus stage,
which cuts what an earlier document has: make them of text that the corpus does not have otherwise.
"""

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import yaml
from pydantic import Field

from openqwen.instruct.synthesize.inputs import DATA, documents
from openqwen.instruct.synthesize.passages import is_chinese, passages
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import whole_file
from openqwen.support.generators import Generators
from openqwen.support.progress import progress
from openqwen.support.settings import Settings
from openqwen.support.stage import Stage, StageRun

LongKind = Literal["natural", "middle", "keyword", "neighbour", "order"]
Wording = dict[str, str]
_WORD = re.compile(r"[^\W\d_\u2e80-\u9fff]{5,}|[\u3400-\u9fff]{2}")
_RARE = 3  # most paragraphs with a keyword
_PARTS = 12  # most parts that are shuffled
_START = 60  # characters by which a paragraph is named


class LongDocumentsConfig(Settings):
    """Which long documents are made. 4 characters of English are about a token."""

    kinds: list[LongKind] = Field(
        ["natural", "middle", "keyword", "neighbour", "order"],
        min_length=1,
        description="kinds; a stretch of text becomes one of them, drawn",
    )
    shortest: int = Field(32_000, ge=1, description="fewest characters of a stretch")
    longest: int = Field(120_000, ge=1, description="most characters of a stretch")


def natural(paragraphs: Sequence[str], rng: np.random.Generator, words: Wording) -> str:
    """The text as it is."""
    return "\n\n".join(paragraphs)


def middle(paragraphs: Sequence[str], rng: np.random.Generator, words: Wording) -> str:
    """The text with a gap of a tenth of its paragraphs, and what is missing at the end."""
    size = max(1, len(paragraphs) // 10)
    if len(paragraphs) < size + 2:
        return ""
    start = int(rng.integers(1, len(paragraphs) - size))
    gap, after = paragraphs[start : start + size], paragraphs[start + size :]
    parts = [*paragraphs[:start], words["gap"], *after, words["middle"], *gap]
    return "\n\n".join(parts)


def keyword(paragraphs: Sequence[str], rng: np.random.Generator, words: Wording) -> str:
    """The text, and again all paragraphs that hold a word which is rare in it."""
    held = [set(_WORD.findall(paragraph)) for paragraph in paragraphs]
    for number in rng.permutation(len(paragraphs)).tolist():
        for word in rng.permutation(sorted(held[number])).tolist():
            found = [p for p in paragraphs if word in p]
            if len(found) <= min(_RARE, len(paragraphs) // 2):
                return "\n\n".join([*paragraphs, words["keyword"].format(word=word), *found])
    return ""


def neighbour(paragraphs: Sequence[str], rng: np.random.Generator, words: Wording) -> str:
    """The text, and again the paragraph behind one whose beginning is given."""
    starts = [paragraph[:_START] for paragraph in paragraphs]
    clear = [n for n in range(len(paragraphs) - 1) if starts.count(starts[n]) == 1]
    if len(paragraphs) < 3 or not clear:
        return ""
    number = clear[int(rng.integers(len(clear)))]
    asked = words["neighbour"].format(start=" ".join(starts[number].split()))
    return "\n\n".join([*paragraphs, asked, paragraphs[number + 1]])


def order(paragraphs: Sequence[str], rng: np.random.Generator, words: Wording) -> str:
    """The parts of the text, shuffled and numbered, and the numbers in the right order."""
    count = min(_PARTS, len(paragraphs))
    if count < 3:
        return ""
    cuts = np.linspace(0, len(paragraphs), count + 1).astype(int)
    parts = ["\n\n".join(paragraphs[a:b]) for a, b in pairwise(cuts)]
    places = rng.permutation(count)  # the part that stands at each place
    shown = [f"[{place}]\n{parts[part]}" for place, part in enumerate(places.tolist(), 1)]
    right = ", ".join(str(place + 1) for place in np.argsort(places).tolist())
    return "\n\n".join([*shown, f"{words['order']} {right}"])


_MAKERS: dict[str, Callable[[Sequence[str], np.random.Generator, Wording], str]] = {
    "natural": natural,
    "middle": middle,
    "keyword": keyword,
    "neighbour": neighbour,
    "order": order,
}


def run_long_documents(run: StageRun) -> dict[str, float]:
    """Documents → documents.jsonl with long ones."""
    config, source = run.config, run.inputs["documents"]
    wordings = yaml.safe_load((DATA / "long_documents.yaml").read_text(encoding="utf-8"))
    made = short = unfit = characters = 0
    with (
        whole_file(run.output / "documents.jsonl") as file,
        progress("long documents", None, "documents") as bar,
    ):
        for document in documents(source):
            stretches = passages(document["text"], config.shortest, config.longest)
            short += not stretches
            for number, stretch in enumerate(stretches):
                name = f"{document['id']}/{number}"
                rng = Generators(run.seed)[f"long/{name}"]
                kind = str(rng.choice(config.kinds))
                language = "zh" if is_chinese(stretch) else "en"
                text = _MAKERS[kind](stretch.split("\n\n"), rng, wordings[language])
                unfit += not text
                if text:
                    origin = {"method": "long", "seed": run.seed, "kind": kind, "parents": [name]}
                    record = {"id": f"{name}/{kind}", "text": text, "language": language}
                    line = json.dumps(record | {"origin": origin}, ensure_ascii=False)
                    file.write(line + "\n")
                    made, characters = made + 1, characters + len(text)
            bar.advance(1, made=made)
    if not made:
        raise OpenQwenError(
            f"No document has {config.shortest:,} characters that can be used.",
            where=source,
            do="give longer documents, or a smaller --shortest",
        )
    return {"documents": made, "characters": characters, "too_short": short, "unfit": unfit}


STAGE = Stage(
    name="synthesize-long",
    help="Long documents for the long-context phase, made without a model.",
    config=LongDocumentsConfig,
    inputs={
        "documents": "A folder or a file of documents that the corpus does not have otherwise."
    },
    outputs=["documents"],
    run=run_long_documents,
)
