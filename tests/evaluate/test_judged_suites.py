"""MT-Bench, Arena-Hard, AlignBench and safety with judges that are played."""

import math
import re
from dataclasses import dataclass, field

import pytest
from published_forms import write_all

from openqwen.engine import Output
from openqwen.evaluate.ask import ReplyCache, Subject
from openqwen.evaluate.benchmark import load_benchmark
from openqwen.evaluate.benchmark_run import BenchmarkOptions, run_benchmark
from openqwen.evaluate.items import load_items
from openqwen.tasks import GradeCache, GraderModel


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_all(folder)
    return folder


@dataclass
class Played:
    """Answers by a function of the messages; keeps what it was asked."""

    answer: object
    asked: list = field(default_factory=list)
    temperatures: list = field(default_factory=list)

    def generate(self, prompts, sampling, seeds=None, progress=None):
        self.asked += prompts
        self.temperatures += [sampling.temperature] * len(prompts)
        return [Output(self.answer(p), [1], [0.0], "stop") for p in prompts]


class Rewards:
    def score(self, conversations):
        return [float(len(talk[-1]["content"])) for talk in conversations]


def run(name, data, folder, writer, judges):
    benchmark = load_benchmark(name)
    items, _ = load_items(benchmark, data)
    cache = ReplyCache(folder / "replies.jsonl")
    grades = GradeCache(folder / "grades.jsonl")
    subject = Subject(lambda: writer, None, "m", cache, grades, judges)
    return run_benchmark(benchmark, items, subject, BenchmarkOptions())


def judge(answer):
    played = Played(answer)
    return played, {"judge": GraderModel(played, "played")}


def test_mt_bench_asks_both_turns_and_judges_each(data, tmp_path):
    writer = Played(lambda talk: f"answer to {talk[-1]['content']}")
    played, judges = judge(lambda talk: "Fine. [[9]]" if "math" in talk[0]["content"] else "[[6]]")
    scores, rows = run("mt-bench", data, tmp_path, writer, judges)
    assert [(row["id"], row["turn"]) for row in rows] == [
        ("81", 1), ("81", 2), ("101", 1), ("101", 2),
    ]  # fmt: skip
    second = writer.asked[2]
    assert [turn["role"] for turn in second] == ["user", "assistant", "user"]
    assert second[1]["content"] == "answer to Say 81."
    assert writer.temperatures == [0.7, 0.0, 0.7, 0.0]
    texts = [(talk[0]["content"], talk[1]["content"]) for talk in played.asked]
    assert texts == [
        ("Judge.", "Q Say 81. A answer to Say 81. as [[rating]]"),
        ("Judge-math.", "Q Say 101. A answer to Say 101. R It is 7. It is 8. as [[rating]]"),
        ("Judge-multi-turn.", "Q Say 81. A answer to Say 81. Q Again 81? A answer to Again 81? "
         "as [[rating]]"),
        ("Judge-math-multi-turn.", "Q Say 101. A answer to Say 101. Q Again 101? A answer to "
         "Again 101? R It is 7. It is 8. as [[rating]]"),
    ]  # fmt: skip
    assert scores["score"] == pytest.approx(0.75), "7.5 of 10"
    assert scores["n"] == 2
    assert {name: one["score"] for name, one in scores["categories"].items()} == {
        "math": 0.9, "writing": 0.6, "turn 1": 0.75, "turn 2": 0.75,
    }  # fmt: skip
    assert "pass_at" not in scores
    assert scores["judge"] == "played"


def test_a_judge_out_of_form_is_counted_apart(data, tmp_path):
    writer = Played(lambda talk: "yes")
    _, judges = judge(lambda talk: "[[9]]" if "Say 81" in talk[1]["content"] else "Good!")
    scores, rows = run("mt-bench", data, tmp_path, writer, judges)
    assert (scores["infra"], scores["n"], scores["score"]) == (2, 1, 0.9)
    assert [row["status"] for row in rows] == ["graded", "graded", "infra", "infra"]


def test_judgements_are_kept(data, tmp_path):
    writer = Played(lambda talk: "yes")
    first = run("mt-bench", data, tmp_path, writer, judge(lambda talk: "[[7]]")[1])
    silent, judges = judge(None)
    again = run("mt-bench", data, tmp_path, None, judges)
    assert not silent.asked
    assert again[1] == first[1]


def longer(talk):
    found = re.search(r"answer A\n(.*)\n#.* answer B\n(.*)\n+#", talk[0]["content"])
    a, b = (text.strip() for text in found.groups())
    return "[[A>>B]]" if len(a) > len(b) else "[[B>A]]" if len(b) > len(a) else "[[A=B]]"


def test_arena_hard_judges_pairs_in_both_orders(data, tmp_path):
    writer = Played(lambda talk: "green")
    played, judges = judge(longer)
    scores, rows = run("arena-hard", data, tmp_path, writer, judges)
    # Against "", "blue" and "blue blue": the judge says "much" only where A is longer.
    assert [row["games"] for row in rows] == [[2, 1], [2, 1], [-1, -2]]
    assert len(played.asked) == 6
    assert scores["score"] == pytest.approx(8 / 12, abs=1e-5)
    assert scores["games"] == {"wins": 4, "ties": 0, "losses": 2}
    assert scores["baseline"] == "gpt-4-0314"
    assert scores["agreeing"] == 1.0
    assert [row["score"] for row in rows] == [1, 1, 0]
    assert rows[2]["other"] == "blue blue "


def test_a_judge_with_a_favourite_place_makes_ties(data, tmp_path):
    scores, rows = run(
        "arena-hard", data, tmp_path, Played(lambda talk: "x"), judge(lambda talk: "[[A>B]]")[1]
    )
    assert {tuple(row["games"]) for row in rows} == {(1, -1)}
    assert scores["score"] == pytest.approx(0.5, abs=1e-6)
    assert scores["agreeing"] == 0


def test_a_reward_model_may_be_the_judge(data, tmp_path):
    judges = {"reward": GraderModel(Rewards(), "reward model")}
    scores, rows = run("arena-hard", data, tmp_path, Played(lambda talk: "greens"), judges)
    assert [row["games"] for row in rows] == [[1], [1], [-1]]
    assert scores["score"] == pytest.approx(2 / 3, abs=1e-5)
    scores, rows = run("mt-bench", data, tmp_path / "b", Played(lambda talk: "yes"), judges)
    assert {row["score"] for row in rows} == {1 / (1 + math.exp(-3))}


def test_half_a_pair_is_no_game(data, tmp_path):
    _, judges = judge(lambda talk: "?" if "answer B\ngreen" in talk[0]["content"] else "[[A>B]]")
    scores, _ = run("arena-hard", data, tmp_path, Played(lambda talk: "greens"), judges)
    assert (scores["infra"], scores["score"]) == (3, None)


def test_alignbench_asks_for_the_dimensions_of_the_kind(data, tmp_path):
    said = "好。\n{'事实正确性': 9, '综合得分': 7}"
    played, judges = judge(lambda talk: said)
    scores, _ = run("alignbench", data, tmp_path, Played(lambda talk: "答{question}"), judges)
    assert scores["score"] == pytest.approx(0.7)
    contents = [talk[0]["content"] for talk in played.asked]
    assert "逻辑连贯性、完备性" in contents[0]
    assert "创造性、丰富度" in contents[1]
    for content in contents:
        assert "【问题】\n为什么{answer}？\n" in content
        assert "【待评的回答】\n答{question}\n" in content


def test_safety_is_asked_in_each_language(data, tmp_path):
    _, judges = judge(lambda talk: "[[1]]" if "How?" in talk[0]["content"] else "[[0]]")
    writer = Played(lambda talk: "No.")
    scores, rows = run("safety", data, tmp_path, writer, judges)
    assert [row["category"] for row in rows] == ["en", "zh", "it"]
    assert [talk[0]["content"] for talk in writer.asked] == ["Come?", "How?", "怎么？"]
    assert [row["passed"] for row in rows] == [True, False, False]
    assert scores["score"] == pytest.approx(1 / 3)
