"""Adaptation and the critic, with scripted answers."""

import pytest
from method_runs import BAD, Marks, chat, lines, make
from pydantic import ValidationError
from scripted import Scripted, number, records, run

from openqwen.instruct.synthesize.methods.adapt import Adapt, AdaptConfig, foreign
from openqwen.instruct.synthesize.methods.critic import Critic, CriticConfig

# --- adapt


def adapt(tmp_path, **settings):
    talks = [chat(f"What is {n}?", f"It is the number {n}.") for n in range(3)]
    talks.append([*chat("One?", "Yes."), *chat("Two?", "No.")])
    source = lines(tmp_path / "d.jsonl", [{"messages": talk} for talk in talks])
    return Adapt(AdaptConfig(**{"samples": 2, **settings}), source)


def speaker(translation="这个数是什么？", answers=("这是一个数。", "不知道。"), score=None):
    def align(text, seed):
        return score or ("Score: 9" if "这是一个数" in text else "Score: 2")

    return Marks(
        ("Translate this request", translation),
        ("Does answer 2 agree", align),
        other=lambda text, seed: answers[number(seed) % len(answers)],
    )


def test_transfer_to_another_language(tmp_path):
    d, p, gates, found = make(tmp_path, adapt(tmp_path, samples=8), speaker())
    assert len(d) == 1  # the same translation of three questions: one record
    assert d[0]["messages"] == chat("这个数是什么？", "这是一个数。")
    assert p[0]["rejected"][0]["content"] == "不知道。"
    assert gates["translation is usable"] == (3, 3)
    assert "several turns" in found["quarantine.jsonl"].decode()


@pytest.mark.parametrize("said", [*BAD, "What is it?", "What is 0?"])
def test_a_translation_must_be_one(tmp_path, said):
    d, _, gates, _ = make(tmp_path, adapt(tmp_path), speaker(translation=said))
    assert not d
    assert gates["translation is usable"] == (0, 3)


def test_answers_in_another_language_or_of_another_meaning(tmp_path):
    d, p, gates, _ = make(tmp_path / "en", adapt(tmp_path), speaker(answers=("It is a number.",)))
    assert not d + p
    assert gates["answer is usable"][0] == 0
    d, p, _, _ = make(tmp_path / "low", adapt(tmp_path), speaker(score="Score: 7"))
    assert not d + p


def test_a_language_is_given_by_its_name():
    with pytest.raises(ValidationError, match="target"):
        AdaptConfig(target="zh")


def test_letters_tell_the_language():
    assert foreign("Bonjour tout le monde", "French") == ""
    assert foreign("Привет", "Russian") == ""
    assert foreign("Привет", "French")
    assert foreign("日本語のテキスト", "Japanese") == ""
    assert foreign("简体中文测试 in P", "Simplified Chinese") == ""
    assert foreign("12 + 3", "Thai") == ""


def test_system_prompts(tmp_path):
    def consistent(text, seed):
        return "Score: 2" if "It is the number" in text else "Score: 9"

    model = Marks(
        ("new system prompts", "- You are a sailor.\n- You are a helpful assistant.\nno item"),
        ("Does the answer keep to the system prompt", consistent),
        other="Aye.",
    )
    method = adapt(tmp_path, form="system", rounds=2)
    d, p, gates, _ = make(tmp_path, method, model)
    assert gates["is a new system prompt"] == (1, 4)
    assert "You are a sailor." in method.systems
    assert len(d) == 4
    assert len(p) == 3  # the original answer, which knew no system prompt, is worse
    for record in d:
        assert record["messages"][0]["role"] == "system"
        assert record["messages"][0]["content"] in method.systems
        assert record["messages"][-1]["content"] == "Aye."
    assert [m["role"] for m in d[-1]["messages"]][:4] == ["system", "user", "assistant", "user"]
    assert p[0]["rejected"][0]["content"] == "It is the number 0."


# --- critic


def critic(tmp_path, values, **settings):
    return Critic(CriticConfig(**settings), lines(tmp_path / "r.jsonl", values))


def strict(text, seed):
    """Finds a wrong number and a rude word; each by one of the scorers."""
    bad = ("Check every fact" in text and "Five" in text) or ("harmless" in text and "Fool" in text)
    return "Score: 4" if bad else "Score: 9"


def test_every_scorer_must_pass(tmp_path):
    values = [
        {"messages": chat("2+2?", said), "origin": {"n": 1}}
        for said in ("Four", "Five", "Fool", "")
    ]
    d, _, gates, _ = make(tmp_path, critic(tmp_path, values), strict)
    assert [r["messages"][1]["content"] for r in d] == ["Four"]
    assert d[0]["origin"]["source"] == {"n": 1}
    assert gates["correctness"][1] - gates["correctness"][0] == 1
    assert gates["safety"][1] - gates["safety"][0] == 1
    d, _, _, _ = make(tmp_path / "one", critic(tmp_path, values, scorers=["language"]), strict)
    assert len(d) == 3
    d, _, _, _ = make(tmp_path / "high", critic(tmp_path, values, least=10), strict)
    assert not d


def test_pairs_are_kept_where_one_side_alone_passes(tmp_path):
    def pair(chosen, rejected):
        q, c = chat("2+2?", chosen)
        return {"prompt": [q], "chosen": [c], "rejected": [chat("", rejected)[1]]}

    values = [
        pair("Four", "Five"),
        pair("Four", "Vier"),
        pair("Five", "Four"),
        pair("Fool", "Five"),
    ]
    d, p, gates, _ = make(tmp_path, critic(tmp_path, values), strict)
    assert not d
    assert [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in p] == [
        ("Four", "Five")
    ]
    assert gates["rejected answer is worse"] == (1, 2)


@pytest.mark.parametrize("bad", BAD)
def test_a_judge_that_says_nothing_passes_nothing(tmp_path, bad):
    d, p, _, _ = make(tmp_path, critic(tmp_path, [{"messages": chat("a", "b")}]), lambda *_: bad)
    assert not d + p


def test_a_judge_of_its_own_is_asked(tmp_path):
    method = critic(tmp_path, [{"messages": chat("2+2?", "Four")}])
    judge = Scripted(lambda *_: "Score: 10")
    model = Scripted(lambda *_: "Score: 0")
    _, found = run(tmp_path / "run", model, method.config, method, judge=judge)
    assert len(records(found, "demonstrations")) == 1
    assert not model.asked
