"""The `instructions select` stage: which instructions of a tagged pool are worth annotating.

Qwen2 report, section 4.1 ("Instruction Selection"), names four scores and gives no formulas; those
of `scores` are ours, but for the complexity, which is InsTag's. The sampling is InsTag's.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from openqwen.corpus.config import MinHashConfig
from openqwen.corpus.deduplicate import near_duplicates, signatures
from openqwen.instruct.collaborate.page import Section, write_page
from openqwen.instruct.collaborate.pool import Instruction, read_pool, write_pool
from openqwen.instruct.collaborate.tree import EDITS, TagTree, apply_edits, history, read_edits
from openqwen.instruct.synthesize import reading
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import write_jsonl
from openqwen.support.generators import Generators
from openqwen.support.page.charts import LineChart, line_chart
from openqwen.support.page.text import count, number, percent
from openqwen.support.progress import notice
from openqwen.support.settings import Settings
from openqwen.support.stage import Stage, StageRun

_BINS = 8  # of a distribution on the page
_NAMES = {
    "complexity": "complexity, tags",
    "diversity": "tag diversity, bits",
    "richness": "semantic richness, bits",
    "completeness": "intent completeness, 0 to 10",
}


class SelectConfig(Settings):
    """What is selected."""

    count: int = Field(6_000, ge=1, description="instructions to select; InsTag's 6,000")
    edits: Path | None = Field(
        None, description="people's edits of the tree of tags; by default those of the artifact"
    )
    least_complexity: int = Field(1, ge=0, description="drop instructions with fewer tags")
    least_diversity: float = Field(0, ge=0, description="drop those with a lower tag diversity")
    least_richness: float = Field(0, ge=0, description="drop those with a lower semantic richness")
    least_completeness: float = Field(
        0, ge=0, le=10, description="drop those whose intent is less complete"
    )
    near_duplicates: MinHashConfig = Field(
        default_factory=lambda: MinHashConfig(shingle_words=3),
        description="of instructions that are nearly the same, the first is kept",
    )
    random_draws: int = Field(
        100, ge=1, description="random selections of the same size that coverage is compared with"
    )


class InstructionScores(NamedTuple):
    """What an instruction is worth.

    complexity: its number of tags (InsTag). diversity: how rare its tags are, the mean of
    log2(instructions / instructions with the tag). richness: how much its words say, the sum of
    log2(instructions / instructions with the word) over its different words. completeness: the
    score of a model, 0 to 10, of whether it says all that an answer needs; None where it has none.
    """

    complexity: int
    diversity: float
    richness: float
    completeness: float | None


def scores(pool: Sequence[Instruction], tags: Sequence[Sequence[str]]) -> list[InstructionScores]:
    """The scores of all instructions of a pool, whose tags are given."""
    tag_counts = Counter(tag for some in tags for tag in some)
    words = [set(reading.words(instruction.text)) for instruction in pool]
    word_counts = Counter(word for some in words for word in some)
    found = []
    for instruction, some, spoken in zip(pool, tags, words):
        rare = [math.log2(len(pool) / tag_counts[tag]) for tag in some]
        # Sorted: the order of a set, and so the rounding of the sum, differs from run to run.
        rich = sum(math.log2(len(pool) / word_counts[word]) for word in sorted(spoken))
        given = instruction.record.get("completeness")
        whole = float(given) if isinstance(given, int | float) else None
        diversity = sum(rare) / len(rare) if rare else 0.0
        found.append(InstructionScores(len(some), diversity, rich, whole))
    return found


def complexity_first(tags: Sequence[Sequence[str]], size: int) -> list[int]:
    """Complexity-first diverse sampling (Lu et al. 2023, algorithm 1).

    The queries stand in the order of their number of tags, the highest first. In each round an
    empty set of tags is filled: a query is taken if it has a tag that is not in the set.

    Args:
        tags: of each query; of queries with as many tags the earlier one comes first.
        size: how many to take.

    Returns:
        The numbers of the queries, in the order in which they are taken: fewer than `size` where
        the rest has no tags.
    """
    # Queries with the same tags are alike to the algorithm, and a round takes at most one of them.
    alike: dict[frozenset[str], list[int]] = {}
    for query in range(len(tags) - 1, -1, -1):
        if tags[query]:
            alike.setdefault(frozenset(tags[query]), []).append(query)  # the earliest is the last
    taken: list[int] = []
    while alike and len(taken) < size:
        seen: set[str] = set()
        for group in sorted(alike, key=lambda some: (-len(some), alike[some][-1])):
            if group <= seen:
                continue
            seen |= group
            taken.append(alike[group].pop())
            if not alike[group]:
                del alike[group]
            if len(taken) == size:
                break
    return taken


def coverage(tags: Sequence[Sequence[str]], chosen: Sequence[int]) -> list[float]:
    """The share of all tags that the first 1, 2, 3, … of the chosen queries have."""
    every = {tag for some in tags for tag in some}
    seen: set[str] = set()
    shares = []
    for query in chosen:
        seen.update(tags[query])
        shares.append(len(seen) / len(every) if every else 0.0)
    return shares


@dataclass(frozen=True)
class Selection:
    """The result: numbers of instructions, and why the others were left out."""

    chosen: list[int]
    candidates: list[int]
    dropped: dict[int, str]


def choose(
    pool: Sequence[Instruction],
    tags: Sequence[Sequence[str]],
    found: Sequence[InstructionScores],
    config: SelectConfig,
) -> Selection:
    """Leave out near-duplicates and low scores, then sample."""
    signature = signatures([one.text for one in pool], config.near_duplicates)
    first = near_duplicates(signature, config.near_duplicates)
    dropped: dict[int, str] = {}
    for query, one in enumerate(found):
        if first[query] != query:
            dropped[query] = f"near-duplicate of {pool[first[query]].id}"
        elif one.complexity < config.least_complexity:
            dropped[query] = "complexity" if one.complexity else "no tags"
        elif one.diversity < config.least_diversity:
            dropped[query] = "tag diversity"
        elif one.richness < config.least_richness:
            dropped[query] = "semantic richness"
        elif config.least_completeness and (one.completeness or 0) < config.least_completeness:
            dropped[query] = "intent completeness"
    candidates = [query for query in range(len(pool)) if query not in dropped]
    taken = complexity_first([tags[query] for query in candidates], config.count)
    return Selection([candidates[place] for place in taken], candidates, dropped)


def run_select(run: StageRun) -> dict[str, float]:
    """A tagged pool → the instructions to annotate, with scores, coverage and a page."""
    config: SelectConfig = run.config
    pool = read_pool(run.data("instructions"))
    tags = _tags(pool, run.inputs["instructions"], config.edits)
    found = scores(pool, tags)
    selection = choose(pool, tags, found, config)
    if not selection.chosen:
        reasons = ", ".join(f"{n} {text}" for text, n in _reasons(selection).items())
        do = "tag the pool first, with a lower --aggregation.frequency, or lower the bounds"
        raise OpenQwenError(f"No instruction is selected: {reasons}.", "instructions select", do)
    rng = Generators(run.seed)["random selections"]
    size = len(selection.chosen)
    curves = []
    for _ in range(config.random_draws):
        drawn = rng.permutation(selection.candidates)[:size].tolist()
        curves.append(coverage(tags, drawn))
    own, random = coverage(tags, selection.chosen), np.array(curves)
    records = [
        pool[query].as_record(tags=tags[query], scores=found[query]._asdict())
        for query in selection.chosen
    ]
    write_pool(run.output, records)
    chosen = set(selection.chosen)
    rows: list[dict[str, Any]] = []
    for query, instruction in enumerate(pool):
        row = {"id": instruction.id, **found[query]._asdict(), "selected": query in chosen}
        why = {"dropped": selection.dropped[query]} if query in selection.dropped else {}
        rows.append(row | why)
    write_jsonl(run.output / "scores.jsonl", rows)
    _write_page(run.output, found, selection, own, random)
    return {
        "selected": float(size),
        "pool": float(len(pool)),
        "coverage": own[-1],
        "random_coverage": float(random[:, -1].mean()),
        "random_coverage_std": float(random[:, -1].std()),
        "near_duplicates": float(sum("near-dup" in why for why in selection.dropped.values())),
        "complexity": float(np.mean([found[query].complexity for query in selection.chosen])),
    }


def _tags(pool: Sequence[Instruction], source: Path, edits: Path | None) -> list[list[str]]:
    """The tags of the instructions, after people's edits of the tree."""
    folder = source if source.is_dir() else source.parent
    beside = folder / EDITS
    if edits is None and beside.exists():
        if folder is source:
            edits = beside
        else:  # the input, and so the selection, does not depend on them
            notice("edits of the tree are not used; give the folder, or --edits", beside)
    if edits is None:
        return [list(instruction.tags) for instruction in pool]
    tree, changes = TagTree.read(folder), read_edits(edits)
    notice(f"{len(history(changes).active):,} edits of the tree of tags hold", edits)
    for note in apply_edits(tree, changes):
        notice(note, edits)
    return tree.tags_of(instruction.raw for instruction in pool)


def _reasons(selection: Selection) -> Counter[str]:
    return Counter(why.partition(" of ")[0] for why in selection.dropped.values())


def _write_page(
    folder: Path,
    found: Sequence[InstructionScores],
    selection: Selection,
    own: Sequence[float],
    random: np.ndarray,
) -> None:
    lead = f"{count(len(own))} of {count(len(found))} instructions are selected. They have "
    lead += f"{percent(own[-1])} of the pool's tags; random selections of the same size have "
    lead += f"{percent(random[:, -1].mean())} ± {number(100 * random[:, -1].std(), 1)}."
    steps = np.arange(1, len(own) + 1)
    curves = {"raw": random.mean(0), "smooth": np.array(own)}
    chart = line_chart(steps, curves, "tags that are covered, by size; pale: random selections")
    sections = [Section("Coverage", "", [], [], [_over(chart, "taken")])]
    for name, title in _NAMES.items():
        rows = _distribution([getattr(one, name) for one in found], selection.chosen)
        columns = ["from", "to", "pool", "selected", "share of the selection"]
        sections.append(Section(title.capitalize(), "", columns, rows))
    left = [[reason, n] for reason, n in _reasons(selection).most_common()]
    sections.append(Section("Left out", "", ["reason", "instructions"], left))
    write_page(folder, "Selection", lead, sections)


def _over(chart: LineChart | None, name: str) -> LineChart | None:
    """A chart with another name of its x values."""
    return chart and replace(chart, x_rows=[(name, marks) for _, marks in chart.x_rows])


def _distribution(values: Sequence[float | None], chosen: Sequence[int]) -> list[list[Any]]:
    """Rows of a table: a range, how many of the pool and of the selection are in it."""
    known = [value for value in values if value is not None]
    if not known:
        return []
    edges = np.histogram_bin_edges(known, _BINS)
    pool, _ = np.histogram(known, edges)
    inside, _ = np.histogram([v for q in chosen if (v := values[q]) is not None], edges)
    bounds = zip(edges[:-1], edges[1:], pool.tolist(), inside.tolist())
    return [[number(a, 1), number(b, 1), n, m, m / max(len(chosen), 1)] for a, b, n, m in bounds]


STAGE = Stage(
    name="instructions-select",
    help="Score a tagged pool and select instructions, complex and diverse ones first.",
    config=SelectConfig,
    inputs={"instructions": "A tagged pool: an artifact of `instructions tag`, or its file."},
    outputs=["instructions"],
    run=run_select,
)
