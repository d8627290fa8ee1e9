"""Tags by scripted models, and InsTag's aggregation in closed form."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from method_runs import BAD, Marks, lines
from scripted import Scripted, number, run

from hostile import Hostile
from openqwen.cli import main
from openqwen.engine import Engine, Output
from openqwen.engine.constrain import Structures
from openqwen.instruct.collaborate.aggregate import AggregationConfig, aggregate, plain
from openqwen.instruct.collaborate.embed import embedder
from openqwen.instruct.collaborate.mining import dbscan
from openqwen.instruct.collaborate.pool import Instruction, read_pool
from openqwen.instruct.collaborate.tag import TagConfig, Tagging, answer_form, build_tree, read_tags
from openqwen.model import load_model
from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer import Tokenizer, load_tokenizer
from openqwen.tokenizer.pretokenize import BYTES_IN_ID_ORDER


def config(**values):
    base = {"frequency": 1, "stem": False, "distance": 0, "support": 2}
    return AggregationConfig(**(base | values))


def embed(texts):
    """Texts with the same first letter are in one direction, but for a little."""
    vectors = np.zeros((len(texts), 27))
    for row, text in zip(vectors, texts):
        row[ord(text[0]) % 26] = 1.0
        row[26] = 0.01 * len(text)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def counts(tree):
    return {step["step"]: (step["tags"], step["uses"], step["instructions"]) for step in tree.steps}


def names(tree):
    return {name: node.count for name, node in tree.nodes.items()}


# --- aggregation


def test_the_frequency_filter_at_its_threshold():
    raw = [["a", "a"]] * 2 + [["b"]] * 3 + [["c"]] * 4  # "a" twice in one instruction counts once
    tree, _ = aggregate(raw, config(frequency=3), None)
    assert names(tree) == {"c": 4, "b": 3}
    assert counts(tree)["raw"] == (3, 9, 9)
    assert counts(tree)["frequency"] == (2, 7, 7)


def test_rules_unite_case_and_special_characters():
    raw = [["Math-Problem"], ["math problem", "poem!"], ["Math_Problem"], ["math problem"], ["***"]]
    tree, _ = aggregate(raw, config(), None)
    assert names(tree) == {"math problem": 4, "poem": 1}
    assert tree.nodes["math problem"].forms == {
        "Math-Problem": 1,
        "math problem": 2,
        "Math_Problem": 1,
    }
    assert counts(tree)["rules"] == (2, 5, 4)
    assert plain("  C++ / 数学_题 ") == "c 数学 题"


def test_stems_unite_forms_of_a_word():
    pytest.importorskip("snowballstemmer")
    raw = [["math problems"], ["math problem"], ["math problem"], ["writing"], ["write"], ["数学"]]
    tree, _ = aggregate(raw, config(stem=True), None)
    assert names(tree) == {"math problem": 3, "write": 2, "数学": 1}


def test_clusters_of_meaning_unite_near_tags():
    raw = [["alpha"], ["alps"], ["alps"], ["beta"]]
    tree, _ = aggregate(raw, config(distance=0.05), embed)
    assert names(tree) == {"alps": 3, "beta": 1}
    assert counts(tree)["meaning"] == (2, 4, 4)
    far, _ = aggregate(raw, config(distance=1e-9), embed)
    assert len(far.nodes) == 3


def test_rules_of_association_unite_tags_that_come_together():
    raw = [["x", "y", "z"]] * 4 + [["z"]] * 4
    tree, rules = aggregate(raw, config(support=4, confidence=0.99), None)
    assert names(tree) == {"z": 8}  # x → y, y → x, x → z and y → z hold always
    assert [(r.given, r.then, r.support) for r in rules if r.given == ("x",)] == [
        (("x",), "y", 4),
        (("x",), "z", 4),
    ]
    tree, rules = aggregate(raw, config(support=5), None)
    assert names(tree) == {"z": 8, "x": 4, "y": 4}
    assert rules == []


def test_a_tag_stands_below_the_closest_wider_tag():
    raw = [["algebra", "math", "school"]] * 4 + [["math", "school"]] * 5 + [["school"]] * 9
    raw += [["algebra"], ["math"]]
    tree, _ = aggregate(raw, config(support=99), None)
    parents = {name: node.parent for name, node in tree.nodes.items()}
    assert parents == {"school": None, "math": "school", "algebra": "math"}  # 4 of 5, 9 of 10
    strict, _ = aggregate(raw, config(support=99, parent=0.85), None)
    assert strict.nodes["algebra"].parent is None


def test_nothing_and_the_same_tag_for_all():
    tree, rules = aggregate([[], []], config(distance=0.05), embed)
    assert (tree.nodes, rules) == ({}, [])
    assert counts(tree)["associations"] == (0, 0, 0)
    tree, _ = aggregate([["x"]] * 50, config(distance=0.05, support=40, frequency=20), embed)
    assert names(tree) == {"x": 50}
    assert tree.nodes["x"].parent is None


def test_the_order_of_instructions_changes_no_tag():
    raw = [[f"t{number(n, k) % 9}" for k in range(4)] for n in range(60)]
    one, _ = aggregate(raw, config(support=9, confidence=0.6), None)
    two, _ = aggregate(raw[::-1], config(support=9, confidence=0.6), None)
    assert names(one) == names(two)
    assert {n: x.parent for n, x in one.nodes.items()} == {
        n: x.parent for n, x in two.nodes.items()
    }


# --- what a model writes


@pytest.mark.parametrize(
    ("said", "tags"),
    [
        ('[{"tag": "Math", "explanation": "numbers"}]', ["Math"]),
        ('```json\n[{"tag": "A"}, {"tag": "A"}, {"tag": " B  c "}]\n```', ["A", "B c"]),
        ('{"tag": "one", "explanation": 3}', ["one"]),
        ('[{"tag": "A", "explanation": "x"}, {"tag": "B", "expl', ["A"]),
        ('Sure! {"tag": "A"}\n{"tag": "B"}', ["A", "B"]),
        ('[{"tag": 7}, {"tag": "***"}, {"tag": ""}, ["A"], null]', []),
        ('["math", "word problem", 3, "math"]', ["math", "word problem"]),
        (f'[{{"tag": "{"long " * 40}"}}]', []),
        ("tags: math, numbers", []),
        ("[" * 5_000, []),
        *((said if isinstance(said, str) else said.text, []) for said in BAD),
    ],
)
def test_tags_are_read_from_any_answer(said, tags):
    assert [entry["tag"] for entry in read_tags(Output(said, finish_reason="stop"))] == tags


POOL = [Instruction(f"i{n}", f"Question {n}?") for n in range(12)]
TAGS = json.dumps([{"tag": "Math", "explanation": "numbers"}, {"tag": "short", "explanation": ""}])
SAYS = Marks(("Score", "Score: 7"), other=TAGS)


def tag(tmp_path, model, pool=POOL, **values):
    settings = TagConfig(**values)
    generator = Scripted(model)
    counted, _ = run(tmp_path, generator, settings, Tagging(settings, pool))
    return counted, generator, tmp_path / "output"


def test_a_pool_is_tagged(tmp_path):
    counted, generator, folder = tag(tmp_path, SAYS)
    metrics = build_tree(folder, config(support=99), None)
    assert counted["tagged"] == 12
    assert len(generator.asked) == 24
    assert metrics == {"tags": 2.0, "raw_tags": 2.0, "tags_each": 2.0}
    records = read_pool(folder / "instructions.jsonl")
    assert records[3].tags == ("math", "short")
    assert records[3].raw == ("Math", "short")
    assert records[3].record["completeness"] == 7
    tree = json.loads((folder / "tree.json").read_text())
    assert tree["tags"][0] == {
        "name": "math",
        "count": 12,
        "parent": None,
        "forms": {"Math": 12},
        "explanations": ["numbers"] * 3,
        "examples": ["i0", "i1", "i2"],
    }
    said = "12 of 12 instructions that the model tagged have one or more of 2 different tags. 0 of"
    assert said in (folder / "report.html").read_text()
    assert not (folder / "tagged.jsonl").exists()


def test_broken_json_is_counted_and_its_whole_entries_are_read(tmp_path):
    cut = Output('[{"tag": "Math", "explanation": "x"}, {"tag": "sh', finish_reason="length")

    def model(text, seed):
        place = int(text.rsplit("Question ", 1)[1].partition("?")[0])
        return [TAGS, cut, "no tags here"][place % 3]

    counted, _, folder = tag(tmp_path, model, completeness=False)
    report = json.loads((folder / "synthesis.json").read_text())
    assert report["gates"]["is JSON"]["passed"] == 4
    assert report["gates"]["has tags"] == {"passed": 8, "of": 12, "yield": 0.6667}
    assert counted["quarantined"] == 4
    build_tree(folder, config(support=99), None)
    page = (folder / "report.html").read_text()
    assert "8 of 12 answers were broken JSON" in page
    assert "no JSON" in (folder / "quarantine.jsonl").read_text()


def test_the_form_of_the_answer_is_forced_unless_that_is_switched_off(tmp_path):
    _, generator, _ = tag(tmp_path / "one", SAYS, POOL[:1], most_tags=3, completeness=False)
    assert generator.sampled[0].structure == answer_form(3)
    _, generator, _ = tag(tmp_path / "two", SAYS, POOL[:1], forced=False, completeness=False)
    assert generator.sampled[0].structure is None


@pytest.mark.parametrize(
    ("said", "whole"),
    [
        ('[{"tag":"word problem","explanation":"numbers in a story"}]', True),
        ('[{"tag":"a","explanation":"b"},{"tag":"诗歌","explanation":"要求写一首诗"}]', True),
        ('[{"tag":"a b c d e","explanation":"b"}]', False),
        ('[{"tag":"Why?","explanation":"b"}]', False),
        ('[{"tag":"a"}]', False),
        ('[{"tag":"a","explanation":"b"},{"tag":"a","explanation":"b"},{"tag":"c', False),
        ("[]", False),
        ("Sure", False),
    ],
)
def test_the_forced_form_takes_short_tags_alone(said, whole):
    pytest.importorskip("llguidance")
    words = Tokenizer(BYTES_IN_ID_ORDER, [])
    matcher = Structures(words, [words.eos_id]).matcher(answer_form(2))
    ids = words.encode(said)
    fits = len(matcher.fitting(ids)) == len(ids)
    for token in ids if fits else ():
        matcher.accept(token)
    ends = matcher.complete or bool(matcher.masks([], words.vocab_size)[0][words.eos_id])
    assert (fits and ends) == whole
    assert not whole or len(read_tags(Output(said, finish_reason="stop"))) == len(json.loads(said))


def test_a_model_of_nonsense_is_an_error_that_says_so(tmp_path):
    _, _, folder = tag(tmp_path, lambda text, seed: BAD[number(text) % len(BAD)])
    with pytest.raises(OpenQwenError, match="No instruction got a tag") as error:
        build_tree(folder, config(), None)
    assert "has tags" in str(error.value)


def test_no_tag_is_frequent_enough(tmp_path, capsys):
    _, _, folder = tag(tmp_path, SAYS)
    metrics = build_tree(folder, AggregationConfig(stem=False), embed)
    assert metrics["tags"] == 0
    assert "none of 2 tags is left" in capsys.readouterr().err
    assert len(read_pool(folder / "instructions.jsonl")) == 12  # what the model wrote is kept


def test_a_tagged_pool_keeps_its_tags(tmp_path):
    _, _, folder = tag(tmp_path / "one", SAYS)
    build_tree(folder, config(frequency=13), None)
    pool = read_pool(folder / "instructions.jsonl")
    _, generator, folder = tag(tmp_path / "two", SAYS, pool)
    assert generator.asked == []
    assert build_tree(folder, config(frequency=12, support=99), None)["tags"] == 2
    again = read_pool(folder / "instructions.jsonl")
    assert [i.record["completeness"] for i in again] == [7] * 12


# --- the command, with a server


@pytest.fixture
def server():
    server = Hostile()

    def respond(handler, body):
        if handler.path.endswith("/embeddings"):
            data = [
                {"index": n, "embedding": embed([text.split('"')[1]])[0].tolist()}
                for n, text in enumerate(body["input"])
            ]
            handler.say(200, {"data": data[::-1]})
            return
        text = body["messages"][-1]["content"].rpartition("Instruction:")[2]  # not the examples
        topic = "alpha" if "1" in text else "alps" if "2" in text else "beta"
        said = json.dumps([{"tag": topic, "explanation": "e"}])
        said = "Score: 4" if "Score" in body["messages"][-1]["content"] else said
        handler.say(200, {"choices": [{"message": {"content": said}, "finish_reason": "stop"}]})

    server.respond = respond
    yield server
    server.shutdown()
    server.server_close()


def words(tmp_path, server, *more):
    path = lines(tmp_path / "pool.jsonl", [{"prompt": f"Question {n}?"} for n in range(9)])
    found = ["instructions", "tag", str(path), "--output", str(tmp_path / "tagged")]
    found += ["--endpoint.url", server.url, "--endpoint.name", "m", "--aggregation.no-stem"]
    return [*found, "--aggregation.frequency", "1", "--aggregation.support", "50", *more]


def test_the_verb_asks_resumes_and_is_reused(tmp_path, server, capsys):
    assert main(words(tmp_path, server, "--limits.requests", "5")) == 1
    assert "limit of 5 requests" in capsys.readouterr().err
    capsys.readouterr()
    assert main(words(tmp_path, server)) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Refine its tree on a page: ")
    assert last.endswith(f"instructions tree {tmp_path / 'tagged'}")
    asked = [path for path, _ in server.seen]
    assert len(asked) == 18 + 1  # none was sent twice; one call for embeddings
    tree = json.loads((tmp_path / "tagged" / "tree.json").read_text())
    assert {t["name"]: t["count"] for t in tree["tags"]} == {"beta": 7, "alpha": 2}
    assert main(words(tmp_path, server)) == 0
    assert len(server.seen) == len(asked)
    # Another threshold: the artifact is the pool, and the model is not asked again.
    again = words(tmp_path, server, "--aggregation.distance", "0")
    again[2], again[4] = str(tmp_path / "tagged"), str(tmp_path / "again")
    assert main(again) == 0
    assert len(server.seen) == len(asked)
    assert len(json.loads((tmp_path / "again" / "tree.json").read_text())["tags"]) == 3


def test_errors_of_the_verb(tmp_path, server, capsys):
    path = lines(tmp_path / "empty.jsonl", [])
    command = words(tmp_path, server)
    command[2] = str(path)
    assert main(command) == 1
    assert "There are no instructions" in capsys.readouterr().err
    assert main(["instructions", "tga"]) == 1
    assert "Did you mean 'tag'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["instructions", "--help"])
    shown = capsys.readouterr().out
    assert "  evolve" in shown
    assert "  tree  " in shown
    assert main(["instructions", "tree", str(tmp_path)]) == 1
    assert "tree.json" in capsys.readouterr().err


def test_a_server_without_embeddings(tmp_path, server, capsys):
    answer = server.respond

    def respond(handler, body):
        if handler.path.endswith("/embeddings"):
            handler.say(404, {"error": {"message": "no"}})
        else:
            answer(handler, body)

    server.respond = respond
    assert main(words(tmp_path, server)) == 1
    assert "The server gives no embeddings" in capsys.readouterr().err
    assert len(server.seen) == 19
    assert main(words(tmp_path, server, "--aggregation.distance", "0")) == 0


def test_embeddings_of_an_engine_have_length_one_in_their_frame():
    seen = []

    class Embedding:
        def embed(self, texts):
            seen.extend(texts)
            return torch.tensor([[3.0, 4.0], [0.0, 0.0]])[: len(texts)]

    vectors = embedder(Embedding())(["math", ""])
    assert vectors.tolist() == [[pytest.approx(0.6), pytest.approx(0.8)], [0.0, 0.0]]
    assert seen[0] == 'This topic: "math" means in one word: "'
    with pytest.raises(OpenQwenError, match="no embeddings"):
        embedder(Scripted(SAYS))(["math"])


@pytest.mark.slow
@pytest.mark.skipif("OPENQWEN_REAL_CHECKPOINT" not in os.environ, reason="needs the checkpoint")
def test_a_real_model_puts_forms_of_a_word_near_each_other():
    path = Path(os.environ["OPENQWEN_REAL_CHECKPOINT"])
    engine = Engine(load_model(path, quantize="int8"), load_tokenizer(path))
    words = ["math", "mathematics", "travel", "travelling", "history"]
    vectors = embedder(engine)(words)
    assert dbscan(vectors, 0.03, 1).tolist() == [0, 0, 1, 1, 2]
