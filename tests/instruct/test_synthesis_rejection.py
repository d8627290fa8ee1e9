"""`openqwen synthesize rejection`: what becomes D and P, and what is refused."""

import json

import pytest
from scripted import Scripted, number, records, run

from openqwen.instruct.synthesize import batches
from openqwen.instruct.synthesize.methods.rejection import Rejection, RejectionConfig
from openqwen.instruct.synthesize.problems import count_items, read_items
from openqwen.instruct.synthesize.prompts import PromptFiles
from openqwen.support.errors import OpenQwenError


def task(name, question, answer=None):
    reference = {} if answer is None else {"answer": answer}
    prompt = [{"role": "user", "content": question}]
    return {"id": name, "prompt": prompt, "grader": "math", "reference": reference}


def write(path, lines):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def paths(*answers, verdict="Verdict: yes"):
    """A generator whose paths to a problem are these, in the order in which it is asked."""
    asked = []

    def answer(text, seed):
        if "Verdict:" in text:
            return verdict(text) if callable(verdict) else verdict
        asked.append(seed)
        return answers[(len(asked) - 1) % len(answers)]

    return Scripted(answer)


def rejected(tmp_path, lines, generator, **settings):
    tasks = write(tmp_path / "tasks.jsonl", lines)
    config = RejectionConfig(**({"samples": 4} | settings))
    return run(tmp_path, generator, config, Rejection(config, tasks))


PATHS = (
    "1 + 2 = 3, so \\boxed{3}",
    "2 + 1 = 3, thus \\boxed{3}",
    "1 + 2 = 4, so \\boxed{4}",
    "1 + 2 = 5, but \\boxed{3}",
)


def test_right_and_sound_paths_become_d_and_wrong_ones_are_rejected(tmp_path):
    counts, found = rejected(tmp_path, [task("a", "1 + 2?", "3")], paths(*PATHS))
    d, (p,) = records(found, "demonstrations"), records(found, "preferences")
    assert {r["messages"][-1]["content"] for r in d} == set(PATHS[:2])
    assert [m["role"] for m in d[0]["messages"]] == ["system", "user", "assistant"]
    assert d[0]["messages"][1]["content"] == "1 + 2?"
    assert p["chosen"][0]["content"] in PATHS[:2]
    assert p["rejected"][0]["content"] == PATHS[2]
    assert p["prompt"] == d[0]["messages"][:2]
    gates = json.loads(found["synthesis.json"])["gates"]
    shares = {name: (g["passed"], g["of"]) for name, g in gates.items()}
    assert shares == {
        "ended": (4, 4),
        "right": (3, 4),
        "calculations": (2, 3),
        "reasonable": (2, 2),
        "distinct": (2, 2),
    }
    assert counts["requests"] == 4 + 2


@pytest.mark.parametrize(
    ("verdict", "kept"),
    [
        ("All good.\nVerdict: yes", 2),
        ("Verdict: no", 0),
        ("Step 2 is wrong. Verdict: yes? Verdict: no", 0),
        ("结论：是", 2),
        ("结论：否", 0),
        ("", 0),
        ("yes", 0),
        ("**Verdict:** Yes", 2),
    ],
)
def test_the_judge_decides_what_is_sound(tmp_path, verdict, kept):
    generator = paths(*PATHS[:2], verdict=verdict)
    counts, found = rejected(tmp_path, [task("a", "1 + 2?", "3")], generator)
    assert counts["demonstrations"] == kept
    if not kept:
        reasons = {e["reason"] for e in records(found, "quarantine")}
        assert reasons <= {"reasonable: judged not sound", "reasonable: no verdict"}


def test_a_judge_of_its_own(tmp_path):
    judge = Scripted(lambda text, seed: "Verdict: no" if "thus" in text else "Verdict: yes")
    tasks = write(tmp_path / "tasks.jsonl", [task("a", "1 + 2?", "3")])
    config = RejectionConfig(samples=2)
    method = Rejection(config, tasks)
    _, found = run(tmp_path, paths(*PATHS[:2]), config, method, judge=judge)
    assert len(judge.asked) == 2
    assert records(found, "demonstrations")[0]["origin"]["judge"] == "judge"
    (d,) = records(found, "demonstrations")
    assert d["messages"][-1]["content"] == PATHS[0]


def test_without_a_reference_the_majority_decides(tmp_path):
    lines = [task("a", "1 + 2?"), task("b", "2 + 2?")]
    many = ("\\boxed{3}", "it is \\boxed{3}", "I say \\boxed{3}", "\\boxed{9}")
    counts, found = rejected(tmp_path, lines[:1], paths(*many))
    assert counts["demonstrations"] == 3
    assert [p["rejected"][0]["content"] for p in records(found, "preferences")] == ["\\boxed{9}"]
    split = ("\\boxed{3}", "\\boxed{4}", "\\boxed{5}", "\\boxed{4}")
    counts, found = rejected(tmp_path / "split", lines, paths(*split))
    assert counts["demonstrations"] == counts["preferences"] == 0
    reasons = [e["reason"] for e in records(found, "quarantine")]
    assert reasons == ["majority: the leading answer has 50% of the votes"] * 2


def test_a_reward_model_weighs_votes_and_chooses_the_best(tmp_path, monkeypatch):
    seen = []

    class Loud:
        @classmethod
        def load(cls, folder):
            seen.append(folder)
            return cls()

        def score(self, chats):
            return [5.0 if "good" in c[-1]["content"] else -5.0 for c in chats]

    monkeypatch.setattr(batches, "RewardModel", Loud)
    said = ("\\boxed{3}", "so \\boxed{3}", "good \\boxed{4}", "good, \\boxed{4} it is")
    lines = [task("a", "1 + 2?"), task("b", "2 + 2?", "4")]
    _, found = rejected(tmp_path, lines, paths(*said), reward=tmp_path / "r", keep=1, judged=False)
    d, p = records(found, "demonstrations"), records(found, "preferences")
    assert [r["messages"][-1]["content"] for r in d] == ["good \\boxed{4}"] * 2
    assert {r["rejected"][0]["content"] for r in p} == set(said[:2])
    assert seen == [tmp_path / "r"]  # loaded once


def test_problems_without_answers_and_lines_that_are_none(tmp_path):
    lines = [
        {"question": "1 + 2?", "answer": "3"},
        {"question": "1 + 2?"},
        {"id": "x", "prompt": []},
        {"id": "x", "prompt": [{"role": "user", "content": 5}]},
        {"prompt": "Say 3.", "grader": "no such", "reference": {"answer": "3"}},
        {"problem": "q" * 200_000},
        {},
    ]
    counts, found = rejected(tmp_path, lines, paths("\\boxed{3}"))
    assert counts["items"] == 7
    refused = [e["item"] for e in records(found, "quarantine") if e["reason"][:10] == "no problem"]
    assert refused == ["x", "x/4", "5", "6", "7"]
    assert counts["demonstrations"] == 1  # both problems give the same record
    assert counts["duplicates"] == 1


@pytest.mark.parametrize(
    ("record", "answer"),
    [
        ({"answer": "3"}, "3"),
        ({"answer": 3}, "3"),
        ({"answer": 2.5}, "2.5"),
        ({"answer": "1 + 2 = 3\n#### 3"}, "3"),
        ({"solution": "so it is \\boxed{3}"}, "3"),
        ({"answer": ""}, None),
        ({"answer": None, "solution": "no box"}, None),
        ({"reference": {"answer": "3"}}, "3"),
    ],
)
def test_answers_in_their_usual_forms(tmp_path, record, answer):
    path = write(tmp_path / "tasks.jsonl", [{"question": "1 + 2?"} | record])
    (item,) = read_items(path, "tasks", "math")
    assert item.data.reference.get("answer") == answer


def test_a_damaged_line_is_found_before_anything_is_asked(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"question": "1 + 1?"}\n' * 3 + "{broken\n")
    with pytest.raises(OpenQwenError, match=r"tasks.jsonl:4"):
        count_items(path, "tasks")


@pytest.mark.parametrize("said", ["", "hm", "\\boxed{", "\\boxed{}" * 99, "3 " * 50_000, "🤷"])
def test_nonsense_makes_no_record(tmp_path, said):
    counts, _ = rejected(tmp_path, [task("a", "1 + 2?", "41")], paths(said))
    assert counts["demonstrations"] == counts["preferences"] == 0


def test_limits_of_records(tmp_path):
    many = [f"{n} + {3 - n} = 3 and so \\boxed{{3}}" for n in range(4)]
    many += [f"I guess \\boxed{{{n}}}" for n in range(10, 14)]
    generator = paths(*many)
    counts, _ = rejected(
        tmp_path, [task("a", "1 + 2?", "3")], generator, samples=8, keep=2, pairs=3, judged=False
    )
    assert (counts["demonstrations"], counts["preferences"]) == (2, 3)
    assert counts["requests"] == 8


def test_earlier_messages_of_a_problem_are_asked_too(tmp_path):
    line = task("a", "And plus 2?", "3")
    earlier = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "What is 1?"},
        {"role": "assistant", "content": "1"},
    ]
    line["prompt"] = [*earlier, *line["prompt"]]
    _, found = rejected(tmp_path, [line], paths(*PATHS), judged=False)
    messages = records(found, "demonstrations")[0]["messages"]
    assert messages[:-1] == [*earlier, {"role": "user", "content": "And plus 2?"}]


def test_gsm8k_as_published(tmp_path):
    line = {"question": "Tom has 1 egg and gets 2. How many?", "answer": "1+2=<<1+2=3>>3\n#### 3"}
    counts, _ = rejected(tmp_path, [line], paths(*PATHS), form="gsm8k")
    assert counts["demonstrations"] == 2


def test_prompts_in_chinese_and_of_ones_own(tmp_path):
    lines = [task("a", "1 + 2?", "3")]
    generator = paths(*PATHS[:2], verdict="结论：是")
    _, found = rejected(tmp_path / "zh", lines, generator, language="zh", judged=False)
    d = records(found, "demonstrations")[0]
    assert "请逐步推理" in d["messages"][0]["content"]
    assert list(d["origin"]["prompts"]) == ["solve.zh"]
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "solve.en.jinja").write_text("{{ question }} Think.")
    _, found = rejected(tmp_path / "own-run", lines, generator, prompts=folder, judged=False)
    assert records(found, "demonstrations")[0]["messages"][0]["content"] == "1 + 2? Think."


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("sovle.en.jinja", "x", "Did you mean 'solve.en'"),
        ("solve.en.jinja", "{{ question", "This is no template"),
        ("solve.en.jinja", "{{ qestion }}", "cannot be rendered: 'qestion' is undefined"),
        ("solve.en.jinja", "{{ ''.__class__.__mro__ }}", "cannot be rendered"),
        ("solve.en.jinja", "{% for i in range(10**9) %}a{% endfor %}", "cannot be rendered"),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path, name, text, what):
    (tmp_path / name).write_text(text)
    with pytest.raises(OpenQwenError, match=what):
        PromptFiles("rejection", tmp_path).messages("solve", "en", {"question": "q"})


def test_shipped_prompts_render_in_both_languages():
    for method, name, values in (
        ("rejection", "solve", {"question": "Q?"}),
        ("rejection", "judge", {"question": "Q?", "solution": "S."}),
        ("execution", "solve", {"question": "Q?", "entry": "f", "example": "assert f(1)"}),
        ("execution", "tests", {"question": "Q?", "entry": "f", "example": "", "count": 5}),
    ):
        prompts = PromptFiles(method)
        texts = [prompts.messages(name, language, values)[1] for language in ("en", "zh")]
        assert texts[0] != texts[1]
        assert all("Q?" in messages[-1]["content"] for messages in texts)


def test_seeds_differ_for_each_sample_and_problem(tmp_path):
    generator = Scripted(lambda text, seed: f"\\boxed{{{number(seed) % 3}}}")
    lines = [task(str(n), f"{n}?", "1") for n in range(5)]
    rejected(tmp_path, lines, generator, judged=False)
    seeds = [seed for _, seed in generator.asked]
    assert len(set(seeds)) == len(seeds) == 20
    assert max(seeds) < 2**31
