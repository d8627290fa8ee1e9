"""The `instructions tag` stage: open tags from a model, then a tree of tags (InsTag).

Lu et al. 2023, "#InsTag: Instruction Tagging for Analyzing Supervised Fine-tuning of Large Language
Models"; Qwen2 report, section 4.1 ("Automatic Ontology Extraction"). The prompts are ours.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from openqwen.engine import Output, Sampling, Structure
from openqwen.instruct.collaborate.aggregate import AggregationConfig, Embed, aggregate
from openqwen.instruct.collaborate.embed import embedder
from openqwen.instruct.collaborate.page import Section, write_page
from openqwen.instruct.collaborate.pool import Instruction, PoolMethod, read_pool, write_pool
from openqwen.instruct.collaborate.tree import TagTree
from openqwen.instruct.synthesize import reading
from openqwen.instruct.synthesize.config import SynthesisConfig, open_generators
from openqwen.instruct.synthesize.method import Item, Steps, Work
from openqwen.instruct.synthesize.runner import Synthesis
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_json, read_jsonl
from openqwen.support.page.text import count, percent
from openqwen.support.progress import notice
from openqwen.support.stage import PROMPTS, Stage, StageRun

_OBJECT = re.compile(r"\{[^{}]*\}")
_LONGEST_TAG = 80  # characters
_EXPLANATIONS = 3  # kept of each tag; so are examples
# Words are counted, not characters: a bound of characters cuts a small model's words in the middle.
_TAG = r"[^\s\"\\.,:;?!()\[\]{}]+( [^\s\"\\.,:;?!()\[\]{}]+){0,3}"
_TOLD = r"[^\s\"\\\[\]{}]+( [^\s\"\\\[\]{}]+){0,15}"


class TagConfig(SynthesisConfig):
    """How instructions are tagged, and how the tags become a tree."""

    max_tokens: int = Field(384, ge=16, description="longest list of tags, in tokens")
    most_tags: int = Field(24, ge=1, description="tags of an instruction that are read")
    longest: int = Field(
        4_000, ge=1, description="characters of an instruction that the model is shown"
    )
    forced: bool = Field(
        True,
        description="force the form of the answer, a JSON list of short tags; by a server, "
        "one that follows JSON schemas",
    )
    completeness: bool = Field(
        True, description="let the model score, 0 to 10, whether an instruction says all it must"
    )
    aggregation: AggregationConfig = Field(
        default_factory=AggregationConfig, description="how tags become fewer"
    )


class Tagging(PoolMethod):
    """One item an instruction. One that has tags already, from an earlier run, keeps them."""

    name = "tag"
    files = ("tagged",)

    def steps(self, item: Item, work: Work) -> Steps[None]:
        """Ask for tags, and for the completeness of the intent."""
        instruction: Instruction = item.data
        if instruction.raw:
            work.record("tagged", instruction.as_record(), **instruction.ancestry())
            return
        text = instruction.text[: self.config.longest]
        prompt = work.messages("tag", text=text)
        form = answer_form(self.config.most_tags) if self.config.forced else None
        sampling = Sampling(self.config.max_tokens, structure=form)
        (output,) = yield from work.ask([prompt], sampling)
        whole = reading.json_value(output.text) is not None and output.finish_reason == "stop"
        work.gate("is JSON", whole)  # of a broken list, the whole entries are read
        tags = read_tags(output)[: self.config.most_tags]
        if not work.gate("has tags", bool(tags), "no tags" if whole else "no JSON", output.text):
            return
        work.gate("all are explained", all(entry["explanation"] for entry in tags))
        values: dict[str, Any] = {"raw": tags}
        if self.config.completeness:
            asked = work.messages("complete", text=text)
            (judged,) = yield from work.ask([asked], Sampling(max_tokens=8), by="judge")
            values["completeness"] = reading.score(judged.text)
            work.gate("has a score", values["completeness"] is not None)
        work.record("tagged", instruction.as_record(**values), **instruction.ancestry())


def answer_form(most: int) -> Structure:
    """A list of 1 to `most` tags of up to four words, each with an explanation of up to 16."""
    texts = {"tag": _TAG, "explanation": _TOLD}
    fields = {name: {"type": "string", "pattern": f"^{form}$"} for name, form in texts.items()}
    entry: dict[str, Any] = {"type": "object", "properties": fields, "required": list(fields)}
    entry["additionalProperties"] = False
    schema = {"type": "array", "items": entry, "minItems": 1, "maxItems": most}
    return Structure("json_schema", json.dumps(schema))


def read_tags(output: Output) -> list[dict[str, str]]:
    """The different tags in an answer, with their explanations, in order.

    Of a list that is broken or cut, the entries that are whole.
    """
    value = reading.json_value(output.text)
    if not isinstance(value, list):
        value = [reading.json_value(text) for text in _OBJECT.findall(output.text)]
    tags: dict[str, dict[str, str]] = {}
    for entry in value:
        given = entry if isinstance(entry, dict) else {"tag": entry}  # many write bare texts
        if not isinstance(given.get("tag"), str):
            continue
        tag = " ".join(given["tag"].split())
        if tag and len(tag) <= _LONGEST_TAG and any(map(str.isalnum, tag)):
            explanation = given.get("explanation")
            told = explanation[:500] if isinstance(explanation, str) else ""
            tags.setdefault(tag, {"tag": tag, "explanation": told})
    return list(tags.values())


def run_tag(run: StageRun) -> dict[str, float]:
    """A pool → the same with tags, and the tree of tags."""
    pool = read_pool(run.data("instructions"))
    generators = open_generators(run.config, run.inputs)
    runner = Synthesis(
        Tagging(run.config, pool), generators, run.config, run.seed, run.output, run.scratch
    )
    counts = runner.run(len(pool))
    return build_tree(run.output, run.config.aggregation, embedder(generators["model"][0])) | counts


def build_tree(folder: Path, config: AggregationConfig, embed: Embed | None) -> dict[str, float]:
    """Turn `tagged.jsonl` of a folder into the tagged pool, its tree and a page."""
    records = list(read_jsonl(folder / "tagged.jsonl"))
    report = read_json(folder / "synthesis.json")
    if not records:
        what = f"No instruction got a tag: {report['reasons']}."
        do = "give another model"
        raise OpenQwenError(what, "instructions tag", do)
    raw = [[entry["tag"] for entry in record["raw"]] for record in records]
    tree, rules = aggregate(raw, config, embed)
    tags = tree.tags_of(raw)
    _explain(tree, records, tags)
    tree.write(folder)
    write_pool(folder, ({**record, "tags": some} for record, some in zip(records, tags)))
    (folder / "tagged.jsonl").unlink()
    if not tree.nodes:
        most = tree.steps[0]["tags"]
        text = f"none of {most:,} tags is left; tag this artifact again with a lower "
        notice(text + "--aggregation.frequency: the model is not asked again", "aggregation")
    _write_page(folder, tree, report, [f"{', '.join(r.given)} → {r.then}" for r in rules])
    metrics = {"tags": tree.steps[-1]["tags"], "raw_tags": tree.steps[0]["tags"]}
    metrics["tags_each"] = sum(map(len, tags)) / len(tags)
    return {name: float(value) for name, value in metrics.items()}


def _explain(tree: TagTree, records: Sequence[dict[str, Any]], tags: Sequence[list[str]]) -> None:
    """Give each tag some explanations that the model wrote, and some instructions."""
    names = {form: node for node in tree.nodes.values() for form in node.forms}
    for record, some in zip(records, tags):
        for name in some:
            if len(tree.nodes[name].examples) < _EXPLANATIONS:
                tree.nodes[name].examples.append(record["id"])
        for entry in record["raw"]:
            node = names.get(entry["tag"])
            if node and entry["explanation"] and len(node.explanations) < _EXPLANATIONS:
                node.explanations.append(entry["explanation"])


def _write_page(folder: Path, tree: TagTree, report: dict[str, Any], rules: Sequence[str]) -> None:
    json_gate = report["gates"].get("is JSON", {"passed": 0, "of": 0})
    broken = json_gate["of"] - json_gate["passed"]
    left = tree.steps[-1]
    lead = f"{count(left['instructions'])} of {count(report['tagged'])} instructions that the model"
    lead += f" tagged have one or more of {count(left['tags'])} different tags. "
    lead += f"{count(broken)} of {count(json_gate['of'])} answers were broken JSON."
    first = tree.steps[0]["tags"] or 1
    steps = [
        [s["step"], s["tags"], s["uses"], s["instructions"], s["tags"] / first] for s in tree.steps
    ]
    nodes = list(tree.nodes.values())[:200]
    most = nodes[0].count if nodes else 1
    shown = [[n.name, n.parent or "", len(n.forms), n.count, n.count / most] for n in nodes]
    aggregation = Section(
        "Aggregation",
        "Tags, their uses and the instructions that have one, after each step.",
        ["step", "tags", "uses", "instructions", ""],
        steps,
    )
    tags = Section(
        "Tags", "The 200 most frequent.", ["tag", "below", "forms", "instructions", ""], shown
    )
    refused = Section(
        "Refused answers",
        "The quarantine has their texts.",
        ["reason", "answers", "of all"],
        [[name, n, percent(n / max(json_gate["of"], 1))] for name, n in report["reasons"].items()],
    )
    united = Section("Associations", "", ["rule"], [[rule] for rule in rules[:50]])
    write_page(folder, "Tags", lead, [aggregation, tags, refused, united])


STAGE = Stage(
    name="instructions-tag",
    help="A model tags instructions; the tags become a tree that people can edit (InsTag).",
    config=TagConfig,
    inputs={"instructions": PROMPTS},
    outputs=["instructions"],
    run=run_tag,
)
