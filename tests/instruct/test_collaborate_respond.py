"""Responses by several strategies, for people to rank."""

import json

import pytest
from scripted import Scripted, number, run

from openqwen.engine import Output
from openqwen.instruct.collaborate.pool import Instruction
from openqwen.instruct.collaborate.respond import RespondConfig, Responding
from openqwen.support.errors import OpenQwenError

POOL = [Instruction(f"i{n}", f"What is the matter with town {n}?") for n in range(8)]


def respond(tmp_path, small, large=None, pool=POOL, **values):
    config = RespondConfig(**values)
    models = {"model": "small", **({"model-2": "large"} if large else {})}
    others = {"model-2": Scripted(large)} if large else {}
    generator = Scripted(small)
    method = Responding(config, pool, models)
    counts, found = run(tmp_path, generator, config, method, **others)
    records = [json.loads(x) for x in found["tasks.jsonl"].decode().splitlines()]
    return counts, records, generator, json.loads(found["synthesis.json"])


def said(text, seed):
    return " ".join(f"w{number(text, seed, n) % 10_000}" for n in range(12))


def test_tasks_have_different_responses_of_all_models(tmp_path):
    counts, records, generator, _ = respond(tmp_path, said, lambda t, s: "L " + said(t, s))
    assert counts["tasks"] == 8
    for record in records:
        assert record["prompt"] == [{"role": "user", "content": POOL[int(record["id"][1])].text}]
        assert [r["id"] for r in record["responses"]] == ["0", "1", "2", "3"]
        origins = [r["origin"] for r in record["responses"]]
        assert [o["model"] for o in origins].count("large") == 2
        assert len({tuple(o.values()) for o in origins}) == 4
    assert len({r["origin"]["system"] for x in records for r in x["responses"]}) == 4
    assert records[0]["origin"]["method"] == "respond"
    systems = [text for text, _ in generator.asked if text.startswith("You are")]
    assert systems, "system prompts are asked"


def test_strategies_are_drawn_by_the_seed_alone(tmp_path):
    one = respond(tmp_path / "1", said, limits={"concurrency": 1})[1]
    two = respond(tmp_path / "2", said, limits={"concurrency": 9})[1]
    assert one == two


def test_duplicates_are_collapsed(tmp_path):
    def model(text, seed):
        return "The road is closed in the  winter months." if seed % 2 else said(text, seed)

    _, records, _, report = respond(tmp_path, model, responses=6)
    for record in records:
        texts = [r["text"] for r in record["responses"]]
        assert sum("road is closed" in text for text in texts) <= 1
    assert report["gates"]["response is new"]["passed"] < report["gates"]["response is new"]["of"]


def test_too_few_different_responses_drop_the_instruction(tmp_path):
    counts, records, _, report = respond(tmp_path, lambda text, seed: "Always the same words.")
    assert records == []
    assert report["reasons"] == {"instruction has responses": 8}
    counts, records, _, _ = respond(tmp_path / "one", lambda t, s: "Always the same.", least=1)
    assert counts["tasks"] == 8


def test_unusable_responses_are_counted(tmp_path):
    endless = Output("and on and on", finish_reason="length")
    bad = ["", endless, "go go " * 200]

    def model(text, seed):
        return bad[seed % 3] if seed % 2 else said(text, seed)

    _, records, _, report = respond(tmp_path, model, responses=8)
    assert all(r["text"].startswith("w") for x in records for r in x["responses"])
    assert {"response is usable"} <= set(report["reasons"])


def test_a_question_that_is_repeated_is_no_response(tmp_path):
    def model(text, seed):
        return text.splitlines()[-1]

    assert respond(tmp_path, model)[1] == []


def test_more_responses_than_strategies_ask_again_with_other_seeds(tmp_path):
    config = {"temperatures": [1.0], "systems": ["none"], "responses": 5}
    _, records, generator, _ = respond(tmp_path, said, pool=POOL[:1], **config)
    assert len(records[0]["responses"]) == 5
    assert len({seed for _, seed in generator.asked}) == 5


def test_a_bad_temperature_is_found_before_anything_is_asked():
    with pytest.raises(OpenQwenError, match="temperature"):
        Responding(RespondConfig(temperatures=[-1.0]), POOL, {"model": "m"})
