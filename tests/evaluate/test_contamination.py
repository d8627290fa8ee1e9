"""Contaminated questions: against a search in plain Python, and the scores of the clean part."""

import json

import pytest
from published_forms import write_all

import openqwen.cli
from openqwen.corpus.decontaminate import EvaluationIndex
from openqwen.evaluate.compare import read_evaluation
from openqwen.evaluate.contamination import RULE, RUNS, find_contaminated, mark_contaminated
from openqwen.evaluate.items import BenchmarkItem
from openqwen.support.errors import OpenQwenError

WORDS = [f"w{n}" for n in range(400)]


def item(number, texts):
    return BenchmarkItem(f"q{number}", "", "?", texts=texts)


def runs_of_13(text, data):
    words, others = text.lower().split(), data.lower().split()
    grams = {tuple(others[i : i + 13]) for i in range(len(others) - 12)}
    return any(tuple(words[i : i + 13]) in grams for i in range(len(words) - 12))


def longest_common(a, b):
    row = [0] * (len(b) + 1)
    for x in a:
        new = [0]
        for j, y in enumerate(b):
            new.append(row[j] + 1 if x == y else max(row[j + 1], new[j]))
        row = new
    return row[-1]


def test_both_criteria_against_plain_python(tmp_path):
    """q0 is copied, q1 with every seventh word changed, q2 shares 13 words alone, q3 nothing."""
    own = [WORDS[n * 40 : n * 40 + 40] for n in range(4)]
    changed = ["x" if n % 7 == 6 else word for n, word in enumerate(own[1])]
    documents = [
        "Before. " + " ".join(own[0]) + " after.",
        " ".join(changed),
        " ".join([*WORDS[300:340], *own[2][:13], *WORDS[340:380]]),
    ]
    items = {"a": [item(n, (" ".join(words),)) for n, words in enumerate(own)]}
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [{"messages": [{"content": documents[0]}]}, {"text": documents[1]}]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "b.txt").write_text(documents[2])
    found = find_contaminated(items, folder, tmp_path / "cache")["a"]
    texts = [" ".join(words) for words in own]
    expected = {
        f"q{n}" for n, text in enumerate(texts) if any(runs_of_13(text, d) for d in documents)
    }
    assert found[RUNS] == expected == {"q0", "q2"}
    rule = set()
    for n, words in enumerate(own):
        for document in documents:
            others = document.lower().replace(".", "").split()
            common = longest_common(words, others)
            if common >= 13 and common >= 0.6 * min(len(words), len(others)):
                rule.add(f"q{n}")
    assert found[RULE] == rule == {"q0", "q1"}


def test_the_same_data_is_compared_once(tmp_path, monkeypatch):
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    (data / "a.txt").write_text(" ".join(WORDS[:40]))
    items = {"a": [item(0, (" ".join(WORDS[:40]),))]}
    first = find_contaminated(items, data, cache)
    assert first["a"][RUNS] == {"q0"}
    monkeypatch.setattr(EvaluationIndex, "analysis", None)
    assert find_contaminated(items, data, cache) == first
    (data / "a.txt").write_text("else")
    with pytest.raises(TypeError):
        find_contaminated(items, data, cache)
    with pytest.raises(OpenQwenError, match="no training data"):
        find_contaminated(items, tmp_path / "none", cache)


def row(number, score, status="graded"):
    return {"id": f"q{number}", "score": score, "status": status}


def test_scores_of_the_clean_part():
    rows = [row(0, 1.0), row(1, 1.0), row(2, 0.0), row(3, 0.0, "infra")]
    scores = {}
    mark_contaminated(scores, rows, {RUNS: {"q0", "q3"}, RULE: {"q0", "q1", "q2", "q3"}})
    runs, rule = (scores["contamination"][name] for name in (RUNS, RULE))
    assert (runs["n"], runs["share"]) == (1, 1 / 3)
    assert (runs["clean"]["score"], runs["clean"]["n"]) == (0.5, 2)
    assert (rule["n"], rule["clean"]) == (3, None)
    assert [one["contaminated"] for one in rows] == [[RUNS, RULE], [RULE], [RULE], [RUNS, RULE]]


def test_the_command_shows_the_clean_part(tmp_path, capsys):
    from tiny_chat import model, tokenizer

    from openqwen.model.checkpoint import save_checkpoint

    write_all(tmp_path / "data")
    save_checkpoint(model(), tokenizer(), tmp_path / "m", chat=True)
    (tmp_path / "corpus").mkdir()
    told = "The man holds a plate. sings it dries it is it and a man holds a plate he eats it"
    (tmp_path / "corpus/a.txt").write_text(told)
    words = ["evaluate", str(tmp_path / "m"), "--data", str(tmp_path / "data"), "--limit", "3"]
    words += ["--tasks", "gsm8k,mmlu-base", "--max-tokens", "2", "--output", str(tmp_path / "out")]
    assert openqwen.cli.main([*words, "--contamination", str(tmp_path / "corpus")]) == 0
    scores = read_evaluation(tmp_path / "out").scores["gsm8k"]
    assert scores["contamination"][RUNS]["n"] == 0
    assert scores["contamination"][RUNS]["clean"]["score"] == scores["score"]
    assert "clean part" in (tmp_path / "out/report.html").read_text()
    assert "| gsm8k | m | 13 words in a row | 0 (0.0" in (tmp_path / "out/report.md").read_text()
