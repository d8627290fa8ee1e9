"""Asking, grading and counting; a killed run goes on, and a second one asks nothing."""

import json
import math
from dataclasses import dataclass, field

import pytest
import torch
from published_forms import write_all
from tiny_chat import model, tokenizer

from openqwen.engine import Engine, Output, Sampling
from openqwen.evaluate import EvaluateConfig
from openqwen.evaluate import model as stage
from openqwen.evaluate.ask import ReplyCache, Subject, fitted, split_pair
from openqwen.evaluate.benchmark import load_benchmark
from openqwen.evaluate.benchmark_run import BenchmarkOptions, run_benchmark, summary
from openqwen.evaluate.compare import compare_on, read_evaluation
from openqwen.evaluate.items import BenchmarkItem, load_items
from openqwen.model import Packed
from openqwen.support.errors import OpenQwenError
from openqwen.support.progress import Progress
from openqwen.support.stage import StageRun
from openqwen.tasks import GRADERS, Grade, Task
from openqwen.tasks.graders import Grader

GSM8K = load_benchmark("gsm8k")


def item(number: int, answer: str = "7") -> BenchmarkItem:
    prompt = [{"role": "user", "content": f"Question {number}?"}]
    task = Task(f"q{number}", prompt, "math", {"answer": answer})
    return BenchmarkItem(f"q{number}", "odd" if number % 2 else "even", prompt, task)


@dataclass
class Scripted:
    """Answers by the question's text, and fails after `most` answers."""

    answers: dict
    asked: list = field(default_factory=list)

    def generate(self, prompts, sampling, seeds=None, progress=None):
        self.asked += [(p[-1]["content"], seed) for p, seed in zip(prompts, seeds)]
        texts = [self.answers[p[-1]["content"]] for p in prompts]
        texts = [t[s % len(t)] if isinstance(t, list) else t for t, s in zip(texts, seeds)]
        return [Output(text, [1, 2], [0.0, 0.0], "stop") for text in texts]


def subject(generator, folder, words=None, identity="m"):
    cache = ReplyCache(folder / "cache.jsonl")
    return Subject(lambda: generator, words, identity, cache)


def test_no_result_infra_and_wrong_are_counted_apart(tmp_path, monkeypatch):
    truth = GRADERS["math"]

    def judge(tasks, answers):
        found = truth.judge(tasks, answers)
        broken = Grade(False, 0.0, "the sandbox failed", "infra")
        return [broken if "break" in a else g for a, g in zip(answers, found)]

    monkeypatch.setitem(GRADERS, "math", Grader(judge, truth.fault))
    said = ["\\boxed{7}", "\\boxed{8}", "I do not know.", "break \\boxed{7}", "\\boxed{7}"]
    scripted = Scripted({f"Question {n}?": text for n, text in enumerate(said)})
    items = [item(n) for n in range(5)]
    scores, rows = run_benchmark(GSM8K, items, subject(scripted, tmp_path), BenchmarkOptions())
    counts = {key: scores[key] for key in ("n", "right", "wrong", "no_answer", "infra")}
    assert counts == {"n": 4, "right": 2, "wrong": 1, "no_answer": 1, "infra": 1}
    assert scores["score"] == 0.5
    assert scores["standard_error"] == pytest.approx(math.sqrt(0.25 / 3))
    assert scores["low"] < 0.5 < scores["high"]
    assert {name: one["score"] for name, one in scores["categories"].items()} == {
        "even": pytest.approx(2 / 3),
        "odd": 0.0,
    }
    assert [row["status"] for row in rows] == ["graded", "graded", "no_answer", "infra", "graded"]
    json.dumps([scores, rows], allow_nan=False)


def test_an_answer_without_a_match_has_no_result(tmp_path):
    bbh = load_benchmark("bbh")
    task = Task("t", [{"role": "user", "content": "Go?"}], "exact", {"answer": "No"})
    one = BenchmarkItem("t", "", [{"role": "user", "content": "Go?"}], task)
    for said, status, right in (
        ("So the answer is no.", "graded", False),
        ("First the answer is Yes.\nNow the answer is No.", "graded", True),
        ("No", "no_answer", False),
    ):
        asked = subject(Scripted({"Go?": said}), tmp_path, identity=said)
        _, (row,) = run_benchmark(bbh, [one], asked, BenchmarkOptions())
        assert (row["status"], row["passed"]) == (status, right)


def test_a_second_run_asks_nothing_and_another_model_is_asked(tmp_path):
    scripted = Scripted({f"Question {n}?": "\\boxed{7}" for n in range(3)})
    items = [item(n) for n in range(3)]
    first = run_benchmark(GSM8K, items, subject(scripted, tmp_path), BenchmarkOptions())
    assert len(scripted.asked) == 3
    again = run_benchmark(GSM8K, items, subject(None, tmp_path), BenchmarkOptions())
    assert again[1] == first[1]
    more = [*items, item(3)]
    scripted.answers["Question 3?"] = "\\boxed{1}"
    run_benchmark(GSM8K, more, subject(scripted, tmp_path), BenchmarkOptions())
    assert [text for text, _ in scripted.asked[3:]] == ["Question 3?"]
    run_benchmark(GSM8K, items, subject(scripted, tmp_path, identity="other"), BenchmarkOptions())
    assert len(scripted.asked) == 7


def test_a_killed_run_keeps_what_was_answered(tmp_path, monkeypatch):
    """The engine is stopped in the middle; the file then ends in a torn line."""
    words, network = tokenizer(), model()
    prompts = [words.encode(f"Say {n}") for n in range(6)]
    engine, seen = Engine(network, words), []
    step = engine.step

    def stopping():
        events = step()
        seen.extend(event for event in events if event.finish_reason)
        if len(seen) >= 3:
            raise KeyboardInterrupt
        return events

    monkeypatch.setattr(engine, "step", stopping)
    sampling = Sampling(max_tokens=6, temperature=1.0)
    bar = Progress("x", 6, "answers")
    lengths = [2, 3, 4, 5, 6, 7]

    def run():
        for prompt, most in zip(prompts, lengths):
            one = Sampling(max_tokens=most, temperature=1.0)
            subject(engine, tmp_path).generate([prompt], one, [most], bar)

    with pytest.raises(KeyboardInterrupt):
        run()
    path = tmp_path / "cache.jsonl"
    kept = path.read_text().splitlines()
    assert len(kept) == 2
    path.write_text(path.read_text() + kept[0][:30])
    fresh = Engine(network, words)
    asked = subject(fresh, tmp_path)
    found = asked.generate([prompts[0]], Sampling(max_tokens=2, temperature=1.0), [2], bar)
    assert "generator" not in vars(asked), "a known answer loads no model"
    assert found[0].text == json.loads(kept[0])["text"]
    asked.generate(prompts, sampling, list(range(6)), bar)
    again = ReplyCache(path)
    assert len(again._replies) == 8
    assert not fresh.busy


def test_samples_have_seeds_of_their_own_and_pass_at_k(tmp_path):
    said = {f"Question {n}?": ["\\boxed{7}", "\\boxed{1}"] for n in range(8)}
    scripted = Scripted(said)
    items = [item(n) for n in range(8)]
    options = BenchmarkOptions(samples=6, temperature=0.8)
    scores, rows = run_benchmark(GSM8K, items, subject(scripted, tmp_path), options)
    assert len({seed for _, seed in scripted.asked}) == 48
    assert (scores["n"], len(rows)) == (8, 48)
    assert set(scores["pass_at"]) == {"1", "5", "6"}
    assert scores["pass_at"]["1"] == pytest.approx(scores["score"])
    assert scores["pass_at"]["1"] < scores["pass_at"]["5"] <= scores["pass_at"]["6"]
    fewer = Scripted(said)
    run_benchmark(GSM8K, items[3:], subject(fewer, tmp_path / "b"), options)
    assert set(fewer.asked) <= set(scripted.asked), "a seed depends on the item, not on its place"
    with pytest.raises(OpenQwenError, match="--temperature"):
        BenchmarkOptions(samples=4)


def plain_sum(network, ids, target):
    packed = Packed.from_lengths([len(ids) + len(target)])
    whole = torch.tensor([*ids, *target])
    with torch.no_grad():
        logits = network.logits(network(whole, packed.positions, packed)).double()
    table = torch.log_softmax(logits, -1)
    return sum(float(table[len(ids) - 1 + n, t]) for n, t in enumerate(target))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_all(folder)
    return folder


@pytest.mark.parametrize("name", ["mmlu-base", "hellaswag", "winogrande", "truthfulqa"])
def test_choices_are_scored_as_by_one_plain_pass_each(name, data, tmp_path):
    words, network = tokenizer(), model(3)
    benchmark = load_benchmark(name)
    items, _ = load_items(benchmark, data)
    scores, rows = run_benchmark(
        benchmark, items, subject(Engine(network, words), tmp_path, words), BenchmarkOptions()
    )
    for one, row in zip(items, rows, strict=True):
        truth = []
        for number, option in enumerate(one.options):
            context = one.prompt + (one.contexts[number] if one.contexts else "")
            bare = context.rstrip()
            ids = words.encode(bare)
            whole = words.encode(context + option)
            assert whole[: len(ids)] == ids
            truth.append(plain_sum(network, ids, whole[len(ids) :]))
        assert row["logprobs"] == pytest.approx(truth, abs=1e-4)
        lengths = [len(option.strip()) for option in one.options]
        marks = [t / n for t, n in zip(truth, lengths)] if name == "hellaswag" else truth
        assert row["chosen"] == marks.index(max(marks))
        if name == "truthfulqa":
            mass = [math.exp(t) for t in truth]
            wanted = sum(m for m, right in zip(mass, one.correct) if right) / sum(mass)
            assert row["score"] == pytest.approx(wanted, abs=1e-4)
    assert scores["n"] == len(items)


class ByPrompt:
    """What a server gives: log-probabilities of all tokens of a prompt but the first."""

    def __init__(self, engine):
        self.engine = engine

    def generate(self, prompts, sampling, seeds=None, progress=None):
        return self.engine.generate(prompts, sampling, seeds, progress)


def test_a_server_gives_the_scores_of_the_engine(data, tmp_path):
    words, network = tokenizer(), model(4)
    benchmark = load_benchmark("mmlu-base")
    items, _ = load_items(benchmark, data)
    engine = Engine(network, words)
    ours = run_benchmark(
        benchmark, items, subject(engine, tmp_path / "a", words), BenchmarkOptions()
    )
    remote = subject(ByPrompt(engine), tmp_path / "b", words)
    theirs = run_benchmark(benchmark, items, remote, BenchmarkOptions())
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-4)
    with pytest.raises(OpenQwenError, match="compares likelihoods"):
        subject(engine, tmp_path / "c").check("mmlu-base", items[0].prompt, True)


def test_prompts_beyond_the_context_are_counted_and_crash_nothing(tmp_path):
    words, network = tokenizer(), model()
    long = BenchmarkItem("long", "", "word " * 3000, item(1).task)
    base = load_benchmark("gsm8k-base")
    asked = subject(Engine(network, words), tmp_path, words)
    scores, (row,) = run_benchmark(base, [long], asked, BenchmarkOptions(max_tokens=4))
    assert (row["answer"], row["finish"], scores["cut_off"]) == ("", "length", 1)
    assert scores["no_answer"] == 1
    choice = BenchmarkItem("c", "", "word " * 3000, None, [" A", " B"], [], [1, 0])
    scores, _ = run_benchmark(load_benchmark("mmlu-base"), [choice], asked, BenchmarkOptions())
    assert scores["n"] == 1


def test_a_prefilled_answer_goes_on_in_the_same_turn(data):
    words = tokenizer()
    (one,), _ = load_items(load_benchmark("humaneval"), data)
    ids = subject(None, data, words).prompt(one.prompt)
    assert words.decode(ids, skip_control=False).endswith("<|im_start|>assistant\n```python\n")
    with pytest.raises(OpenQwenError, match="begins the answer"):
        subject(None, data).check("humaneval", one.prompt, False)
    with pytest.raises(OpenQwenError, match="no chat template"):
        subject(None, data, tokenizer(chat=False)).check("humaneval", one.prompt, False)


def test_a_pair_is_cut_as_the_whole_text_is_encoded():
    words = tokenizer()
    context, target = split_pair(words, "Answer: ", "B")
    assert words.decode(target) == " B"
    assert words.decode(context) == "Answer:"
    assert split_pair(words, "", "x")[0] == [words.endoftext_id]
    assert fitted([1, 2, 3, 4], [5, 6], 4) == ([3, 4], [5, 6])
    assert fitted([1, 2], [5, 6, 7, 8], 4) == ([2], [6, 7, 8])


def test_nothing_that_can_be_graded_gives_no_score():
    row = {"id": "a", "category": "", "passed": False, "score": 0.0, "status": "infra"}
    assert summary([row])["score"] is None


def test_a_stage_of_a_recipe_scores_benchmarks_too(data, tmp_path):
    """Before SFT only those that continue a text; the results can be compared, and are the same."""
    words, network, found = tokenizer(), model(), []
    config = EvaluateConfig(tasks="mmlu-base,gsm8k", data=data, limit=2)
    for name in ("a", "b"):
        for part in ("out", "scratch"):
            (tmp_path / name / part).mkdir(parents=True)
        folder = tmp_path / name
        work = StageRun(
            config, {"data": data}, folder / "out", folder / "scratch", 1, "evaluate-sft"
        )
        engine = Engine(network, words)
        assert "gsm8k" not in stage._benchmark_scores(engine, words, work, plain=True)
        scores = stage._benchmark_scores(engine, words, work, plain=False)
        assert scores["benchmarks"] == ["mmlu-base", "gsm8k"]
        assert scores["mmlu-base_low"] <= scores["mmlu-base"] <= scores["mmlu-base_high"]
        found.append({p.name: p.read_text() for p in (folder / "out").rglob("*.json*")})
    assert found[0] == found[1]
    evaluation = read_evaluation(tmp_path / "a" / "out")
    assert compare_on("gsm8k", evaluation, evaluation)["n"] == 2


def test_contexts_that_begin_alike_are_computed_once(tmp_path):
    """Of a shared prefix all whole pages but the first time come from the cache."""
    words, network = tokenizer(), model()
    engine = Engine(network, words)
    prefix = words.encode("Many words stand before each of the questions, always the same. " * 8)
    pairs = [([*prefix, 20 + n], [30 + n, 31 + n]) for n in range(12)]
    bar = Progress("x", len(pairs), "choices")
    found = subject(engine, tmp_path, words).likelihoods(pairs, bar)
    stats, page = engine.stats(), engine.config.page_size
    assert stats.tokens_in == sum(len(a) + len(b) for a, b in pairs)
    assert stats.cache_hits == 11 * (len(prefix) // page) * page
    for (context, target), reply in zip(pairs, found, strict=True):
        assert math.fsum(reply.logprobs) == pytest.approx(
            plain_sum(network, context, target), abs=1e-4
        )
