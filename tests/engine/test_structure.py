"""Answers that must fit: every one parses, validates or matches, drafted or not, hot or cold."""

import json
import re

import pytest
from tiny import model, tokenizer

from openqwen.engine import Engine, EngineConfig, Sampling, Structure, constrain
from openqwen.support.errors import OpenQwenError

pytest.importorskip("llguidance")
WORDS = tokenizer()
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "kind": {"enum": ["one", "two"]},
        "list": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "kind", "list"],
    "additionalProperties": False,
}


def ask(structure, temperature=1.0, count=8, **config):
    engine = Engine(model(seed=2), WORDS, EngineConfig(**config))
    sampling = Sampling(max_tokens=90, temperature=temperature, structure=structure)
    outputs = engine.generate([[n + 1, 2, 3] for n in range(count)], sampling, range(count))
    return outputs, engine.stats()


@pytest.mark.parametrize(
    "config", [{}, {"speculate": 6, "draft_below": 99}], ids=["plain", "drafted"]
)
def test_json_fits_its_schema(config):
    outputs, stats = ask(Structure("json_schema", json.dumps(SCHEMA)), **config)
    for output in outputs:
        assert output.finish_reason == "stop"
        value = json.loads(output.text)
        assert list(value) == ["name", "kind", "list"]
        assert len(value["name"]) <= 5
        assert value["kind"] in ("one", "two")
        assert all(isinstance(x, bool) for x in value["list"])
        assert len(value["list"]) <= 3
        outside = re.sub(r'"(\\.|[^"\\])*"', '""', output.text)
        assert not re.search(r"\s", outside)
    if config:  # names of properties follow by force: those guesses are always right
        assert stats.accepted > 0.9 * stats.drafted > 90
        assert [o.token_ids for o in outputs] == [
            o.token_ids for o in ask(outputs[0].sampling.structure)[0]
        ]


def test_regex_and_grammar_rule_the_whole_answer():
    pattern = "(ab|ba){2,3}-[0-9]{2}"
    for output in ask(Structure("regex", pattern))[0]:
        assert re.fullmatch(pattern, output.text)
        assert output.finish_reason == "stop"
    for output in ask(Structure("grammar", 'start: "(" start? ")"'), temperature=3.0)[0]:
        half = len(output.text) // 2
        assert output.text == "(" * half + ")" * half or output.finish_reason == "length"


def test_probabilities_are_those_of_what_was_allowed():
    (output,) = ask(Structure("regex", "(yes|no)"), count=1)[0]
    request = output
    assert all(drawn <= 0 for drawn in request.drawn_logprobs)
    assert sum(request.logprobs) < sum(request.drawn_logprobs)


def test_a_structure_that_cannot_be_followed_is_named():
    engine = Engine(model(), WORDS)
    for structure, words in (
        (Structure("regex", "[a"), "regex"),
        (Structure("json_schema", '{"type": "thing"}'), "thing"),
        (Structure("json_schema", "{"), "json_schema"),
        (Structure("grammar", "start: x"), "grammar"),
    ):
        with pytest.raises(OpenQwenError, match=words):
            engine.submit([1], Sampling(structure=structure))
    assert not engine.busy


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(constrain, "llguidance", None)
    with pytest.raises(OpenQwenError, match="needs the library llguidance"):
        Engine(model(), WORDS).submit([1], Sampling(structure=Structure("regex", "a")))
