"""Benchmark files: each of the package reads its published form; wrong fields are named."""

import base64
import pickle
import zlib

import pytest
from published_forms import write_all

from openqwen.evaluate import items as item_files
from openqwen.evaluate.benchmark import load_benchmark, names, select, suites, unpacked
from openqwen.evaluate.items import find_files, load_items
from openqwen.support.errors import OpenQwenError
from openqwen.tasks import grade


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_all(folder)
    return folder


def first(name, data, **options):
    return load_items(load_benchmark(name), data, **options)[0][0]


PUBLISHED = [name for name in names() if not load_benchmark(name).long]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_benchmark_reads_its_published_form(name, data):
    benchmark = load_benchmark(name)
    items, sums = load_items(benchmark, data)
    assert items
    assert all(len(digest) == 64 for digest in sums.values())
    for item in items:
        text = item.prompt if isinstance(item.prompt, str) else item.prompt[-1]["content"]
        assert text.strip() or item.contexts
        assert "{{" not in text
        assert (item.task is None) == bool(item.options)
        if isinstance(item.prompt, str):
            assert not text.endswith(" "), "a space before a continuation changes its first token"
    if benchmark.published:
        assert all(0 < s < 100 for row in benchmark.published.values() for s in row.values())


RIGHT = {
    "humaneval": "    return x + x",
    "humaneval-plus": "    return x + x",
    "mbpp-evalplus": "def plus(x):\n    return x + 11",
    "mbpp": "def plus(x):\n    return x + 11",
    "mbpp-plus": "def plus(x):\n    return x + 11",
    "multipl-e": "    return 2 * x;",
    "livecodebench": "Use this:\n```python\nprint(sum(map(int, input().split())))\n```",
    "gsm8k": "So it is \\boxed{2}.",
    "math": "It is \\boxed{2}.",
    "mmlu": "B",
    "mmlu-pro": "The answer is (B)",
    "mmlu-redux": "The answer is (B).",
    "bbh": "The answer is No.",
    "ceval": "B",
    "cmmlu": "答案：B",
    "mgsm": "\\boxed{5}",
    "mgsm-base": "Ann hat 3 und 2. Die Antwort lautet 5.",
    "indommlu": "C",
    "kmmlu": "C",
    "jmmlu": "B",
    "okapi-mmlu": "C",
    "turkishmmlu": "E",
    "ammlu": "B",
    "theoremqa": "\\boxed{0}",
    "flores-base": " book 1 devtest.",
    "ifeval": "I say something.",
    "ifeval-fr": "Je dis quelque chose.",
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_answer_passes_and_another_does_not(name, data):
    from openqwen.evaluate.benchmark_run import _extracted

    form, task = load_benchmark(name).answer, first(name, data).task
    wrong = {"humaneval": "    return 5", "humaneval-plus": "    return 6 if x == 3 else x"}
    wrong |= {"multipl-e": "    return 5;", "mbpp-plus": "def plus(x):\n    return 12"}
    wrong |= dict.fromkeys(["ifeval", "ifeval-fr"], "One, two.")
    wrong |= dict.fromkeys(["indommlu", "kmmlu", "okapi-mmlu"], "B")
    texts = [RIGHT[name], wrong.get(name, "The answer is 77, \\boxed{C}")]
    found = [_extracted(text, form.extract, form.first) for text in texts]
    assert [one.passed for one in grade([task] * 2, found)] == [True, False]


def test_prompts_of_choices_are_those_of_the_harness(data):
    mmlu = first("mmlu-base", data)
    head = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    one = "How many legs has a dog, clearly?\nA. 2\nB. 4\nC. 6\nD. 8\nAnswer:"
    two = "Which is a colour?\nA. red\nB. run\nC. ten\nD. two, or three\nAnswer:"
    asked = one.replace("clearly", "plainly")
    assert mmlu.prompt == f"{head}{one} B\n\n{two} A\n\n{asked}"
    assert (mmlu.options, mmlu.correct) == ([" A", " B", " C", " D"], [0, 1, 0, 0])
    hella = first("hellaswag", data)
    assert hella.prompt.endswith("Washing: A man holds a plate. He")
    assert hella.options == [" eats it.. No", " sings it.", " dries it.", " is it."]
    wino = first("winogrande", data)
    assert wino.prompt.endswith("since the cup is too large.\n\n")
    assert wino.contexts == [f"The cup is not in the bag, since the {o}" for o in ("cup", "bag")]
    assert wino.options == [" is too large."] * 2
    arc = first("arc-challenge", data)
    assert arc.prompt.endswith("Question: What is water?\nAnswer:")
    assert arc.options == [" a liquid", " a stone"]
    truth = first("truthfulqa", data)
    assert (truth.options, truth.correct) == ([" No.", " They cannot.", " Yes."], [1, 1, 0])


def test_prompts_in_other_languages(data):
    bele = load_items(load_benchmark("belebele"), data)[0]
    assert bele[0].prompt.count("Answer:") == 2, "another question of the language is the example"
    assert bele[0].prompt.endswith("How many hens has Ann?\nA: 4\nB: 3\nC: none\nD: ten\nAnswer:")
    cause = load_items(load_benchmark("xcopa"), data)[0][1]
    assert cause.prompt == "Das Glas fiel quindi er brach.\n\nDer Becher 1 fiel perché"
    assert (cause.options, cause.correct) == ([" er brach.", " er sang."], [1, 0])
    xwino = load_items(load_benchmark("xwinograd"), data)[0]
    assert [item.correct for item in xwino] == [[1, 0], [0, 1]]
    assert xwino[0].prompt == "The cup is not in the bag, since the bag is too large.\n\n"
    story = first("xstorycloze", data)
    assert (story.category, story.prompt) == ("es", "Uno. Dos. Tres. Cuatro.")
    assert (story.options, story.correct) == ([" Ocho.", " Cinco."], [0, 1])
    paws = first("paws-x", data)
    assert paws.prompt == "Il lit, n'est-ce pas? Oui, lui lit.\n\nIl \"va\", n'est-ce pas?"
    assert (paws.options, paws.correct) == ([" No, elle va.", " Oui, elle va."], [1, 0])
    flores = {item.id: item for item in load_items(load_benchmark("flores-base"), data)[0]}
    assert [name for name in flores if name.endswith("/2")] == [
        "deu-eng/2", "eng-deu/2", "zho_simpl-eng/2", "eng-zho_simpl/2",
    ], "both directions of the languages that are named, English beside them"  # fmt: skip
    to = flores["eng-deu/2"]
    line = "Translate the following English statements to German.\nbook {} dev{}.\n"
    assert to.prompt.startswith(line.format(1, "") + "Buch 1 dev.\n\n" + line.format(2, ""))
    assert to.prompt.endswith("Buch 5 dev.\n\n" + line.format(2, "test"))
    assert to.task.reference == {"translation": "Buch 2 devtest.", "tokenizer": "13a"}
    assert flores["eng-zho_simpl/1"].task.reference["tokenizer"] == "zh"
    assert flores["deu-eng/1"].task.reference["translation"] == "book 1 devtest."
    exam = load_items(load_benchmark("m3exam"), data)[0]
    assert [item.category for item in exam] == ["thai low math"] * 2, (
        "no picture, and a known answer"
    )
    assert [item.options for item in exam] == [[" 1", " 2"], [" A", " B"]]
    assert exam[1].prompt.endswith("Read.\n2 + 2?\n(A) three\n(B) four\nAnswer:")
    russian, _ = load_items(load_benchmark("rummlu"), data)
    assert russian[1].prompt.endswith("Сколько будет 2 + 1?\nA. 2\nB. 3\nC. 4\nD. 5\nОтвет:")
    assert russian[1].prompt.startswith("Сколько будет 1 + 1?")
    assert russian[1].correct == [0, 1, 0, 0]
    mmmlu = load_items(load_benchmark("mmmlu"), data)[0]
    assert [item.category for item in mmmlu] == ["DE-DE anatomy"] * 2
    (indo,), _ = load_items(load_benchmark("indommlu-base"), data)
    assert (indo.options, indo.correct) == ([" A", " B", " C"], [0, 0, 1])
    assert "Air itu apa?\nA. cair\nB. batu\nC. api\nJawaban: A\n\nApi" in indo.prompt
    mgsm = first("mgsm-base", data).prompt
    example = "Frage: Wie viele?\nSchritt-für-Schritt-Antwort: Es sind 5.\n\n"
    assert mgsm == f"{example}Frage: Ann hat 3. Wie viele?\nSchritt-für-Schritt-Antwort:"


def test_chat_shots_are_turns_and_code_answers_begin_with_a_fence(data):
    roles = [message["role"] for message in first("mmlu", data).prompt]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
    assert first("humaneval", data).prompt[-1] == {"role": "assistant", "content": "```python\n"}


def test_splits_and_shots_are_kept_apart(data):
    assert [item.id for item in load_items(load_benchmark("mbpp"), data)[0]] == ["mbpp/11"]
    base = first("mbpp-base", data)
    assert [f"add {n}." in base.prompt for n in (2, 3, 4, 11, 511)] == [True] * 4 + [False]
    assert "\r" not in base.prompt
    assert [item.id for item in load_items(load_benchmark("mmlu-redux"), data)[0]] == ["anatomy/1"]
    gpqa = first("gpqa-base", data)
    assert gpqa.prompt.count("Which is a noble gas?") == 1, "a question is no example of itself"


def test_examples_and_questions_may_count_their_ids_alike(data):
    items = load_items(load_benchmark("xcopa"), data)[0]
    assert [item.id for item in items] == ["it/0", "it/1"]
    assert ["Das Glas" in item.prompt for item in items] == [True, True], "val/0 is no test/0"


def test_options_are_shuffled_by_the_seed_alone(data):
    orders = {first("gpqa", data, seed=seed).task.reference["answer"] for seed in range(20)}
    assert orders == set("ABCD")
    item = first("gpqa", data, seed=3)
    letter = item.task.reference["answer"]
    assert f"({letter}) neon" in item.prompt[0]["content"]
    assert item == first("gpqa", data, seed=3)


def test_a_limit_draws_items_and_keeps_their_order(data):
    benchmark = load_benchmark("gsm8k")
    drawn = {tuple(i.id for i in load_items(benchmark, data, seed, 2)[0]) for seed in range(20)}
    assert len(drawn) > 3
    assert all(ids == tuple(sorted(ids)) for ids in drawn)


def test_a_missing_file_says_where_to_get_it(tmp_path):
    with pytest.raises(OpenQwenError, match="HumanEval") as caught:
        load_items(load_benchmark("humaneval"), tmp_path)
    assert "github.com/openai/human-eval" in str(caught.value)
    assert find_files(load_benchmark("humaneval"), tmp_path) == []


MINE = """
title = "Capitals"
licence = "none"
source = "made up"
get = "it is here"
protocol = "one line"
protocol_source = "here"

[data]
test = ["capitals.jsonl"]

[prompt]
question = "What is the capital of {{ country }}?"

[answer]
grader = "exact"
extract = "Answer: (.*)"
reference = { answer = "capital" }
"""


def mine(folder, *changes):
    text = MINE
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    (folder / "mine.toml").write_text(text)
    (folder / "capitals.jsonl").write_text('{"country": "Peru", "capital": "Lima"}\n')
    return str(folder / "mine.toml")


def test_a_user_adds_a_benchmark_without_python(tmp_path):
    (benchmark,) = select(mine(tmp_path))
    (item,), _ = load_items(benchmark, tmp_path)
    assert benchmark.name == "mine"
    assert item.prompt == [{"role": "user", "content": "What is the capital of Peru?"}]
    assert item.task.reference == {"answer": "Lima"}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("question =", "qestion =", "Did you mean 'question'"),
        ("grader =", "grade =", "Did you mean 'grader'"),
        ('"exact"', '"exat"', "Did you mean 'exact'"),
        ("[answer]", "[answers]", "Did you mean 'answer'"),
        ("{{ country }}", "{{ country", "prompt.question: this is no Jinja template"),
        ("Answer: (.*)", "Answer: (.*", "answer.extract: this is no regular expression"),
        ('title = "Capitals"', "", "'title' is missing"),
        ('test = ["capitals.jsonl"]', "test = []", "data.test"),
        (
            'answer = "capital"',
            'answer = "capital +"',
            "answer.reference.answer: this is no Jinja expression",
        ),
        ("[prompt]", "[prompt]\nshots = 2", "'prompt.shots' needs 'data.shots'"),
        ("title", 'extends = "gsm8"\ntitle', "Did you mean 'gsm8k'"),
        ('title = "Capitals"', 'title = "Capitals', "not valid TOML"),
    ],
)
def test_a_wrong_field_is_named_with_the_nearest(tmp_path, old, new, said):
    with pytest.raises(OpenQwenError) as caught:
        select(mine(tmp_path, (old, new)))
    assert said in str(caught.value)
    assert "mine.toml" in str(caught.value)


def test_a_field_that_a_record_lacks_is_named_with_the_nearest(tmp_path):
    (benchmark,) = select(mine(tmp_path, ("{{ country }}", "{{ contry }}")))
    with pytest.raises(OpenQwenError, match="Did you mean 'country'") as caught:
        load_items(benchmark, tmp_path)
    assert "'prompt.question'" in str(caught.value)
    assert "record 1" in str(caught.value)


def test_templates_run_in_a_sandbox(tmp_path):
    evil = "{{ country.__class__.__mro__[1].__subclasses__() }}"
    (benchmark,) = select(mine(tmp_path, ("{{ country }}", evil)))
    with pytest.raises(OpenQwenError, match="unsafe"):
        load_items(benchmark, tmp_path)


def test_suites_choose_the_benchmarks_with_published_scores():
    assert "qwen2.5-instruct" in suites()
    chosen = {benchmark.name for benchmark in select("qwen2.5-instruct")}
    assert {"humaneval", "gsm8k", "mmlu-pro"} <= chosen
    assert not {name for name in chosen if name.endswith("-base")}
    assert len(select("all")) == len(names())
    with pytest.raises(OpenQwenError, match="Did you mean 'humaneval'"):
        select("humanevall")
    with pytest.raises(OpenQwenError, match="No benchmark"):
        select(" ,")


def test_livecodebench_tests_a_method_too_and_keeps_the_window(data):
    items, _ = load_items(load_benchmark("livecodebench"), data)
    assert [item.id for item in items] == ["abc1", "2999"]
    stdin, method = items
    assert stdin.task.reference["inputs"] == ["1 2\n", "3 4\n"], "public and private"
    assert stdin.task.reference["outputs"] == ["3", "7\n"]
    assert "Read the inputs from stdin" in stdin.prompt[-1]["content"]
    assert "class Solution:" in method.prompt[-1]["content"]
    code = "```python\nclass Solution:\n    def both(self, a: List[int], b: int):\n        return {}\n```"
    texts = [code.format("(*a, b)"), code.format("[b]"), "```python\nprint(3)\n```"]
    grades = grade([method.task] * 2 + [stdin.task], texts)
    assert [one.passed for one in grades] == [True, False, False]


def test_packed_tests_are_never_run(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    harm = base64.b64encode(zlib.compress(pickle.dumps([Harm(), "x"]))).decode()
    assert unpacked(harm) != "[]"
    assert not (tmp_path / "made").exists()
    assert unpacked(' [{"input": 1}]').strip() == '[{"input": 1}]'
    for broken in ("????", base64.b64encode(b"abc").decode()):
        with pytest.raises(Exception, match=r"."):
            unpacked(broken)


def test_a_language_that_cannot_run_here_is_left_out_and_told(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(item_files, "available", lambda: ["python", "javascript"])
    items, _ = load_items(load_benchmark("multipl-e"), data)
    assert [item.category for item in items] == ["js"]
    assert "cpp is not installed: 1 questions are left out" in capsys.readouterr().err
    monkeypatch.setattr(item_files, "available", lambda: ["java", "javascript"])
    jar = tmp_path / "library.jar"
    benchmark = load_benchmark("multipl-e")
    benchmark.answer.libraries["java"] = str(jar)
    assert [item.category for item in load_items(benchmark, data)[0]] == ["js"]
    assert f"java lacks {jar}: 1 questions are left out" in capsys.readouterr().err
    jar.touch()
    assert [item.category for item in load_items(benchmark, data)[0]] == ["java", "js"]
    monkeypatch.setattr(item_files, "available", lambda: ["python"])
    with pytest.raises(OpenQwenError, match="None of the languages"):
        load_items(load_benchmark("multipl-e"), data)


@pytest.mark.parametrize("language", ["cpp", "cs", "java", "js", "php", "ts"])
def test_multipl_e_runs_the_tests_of_each_language(language, data):
    items = load_items(load_benchmark("multipl-e"), data)[0]
    task = next((item.task for item in items if item.category == language), None)
    if task is None:
        pytest.skip(f"{language} is not installed")
    prefix = "$" if language == "php" else ""
    end = "}\n" if language in ("js", "php", "ts") else ""  # else the tests begin with it
    answers = [f"  return {factor} * {prefix}x;\n{end}" for factor in (2, 3)]
    assert [one.passed for one in grade([task] * 2, answers)] == [True, False]


def test_multipl_e_begins_the_function_and_stops_at_its_end(data):
    items = {item.category: item for item in load_items(load_benchmark("multipl-e"), data)[0]}
    cpp, js = items["cpp"], items["js"]
    assert cpp.prompt[-1]["content"].endswith("long twice(long x) {\n")
    assert (cpp.stops, js.stops) == (("\n}",), ("\nfunction ",))
    right = "  return 2 * x;\n}\n"
    assert [one.passed for one in grade([js.task] * 2, [right, "  return 1;\n}"])] == [True, False]
