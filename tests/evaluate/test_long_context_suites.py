"""Needles, RULER and perplexity by position: texts of a wanted length, with right answers."""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from published_forms import book, write_all
from tiny_chat import model, tokenizer

import openqwen.cli
from openqwen.engine import Engine, EngineConfig
from openqwen.evaluate.ask import ReplyCache, Subject
from openqwen.evaluate.benchmark import load_benchmark
from openqwen.evaluate.benchmark_run import BenchmarkOptions, run_benchmark
from openqwen.evaluate.compare import read_evaluation
from openqwen.evaluate.haystack import Books, fitting
from openqwen.evaluate.long_context import Reading, generate_items, plan_lengths, read_documents
from openqwen.model import LongContext, Packed
from openqwen.model.checkpoint import save_checkpoint
from openqwen.support.errors import OpenQwenError
from openqwen.tasks import Task, grade

LENGTH = 8192


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_all(folder)
    return folder


@pytest.fixture(scope="module")
def encode():
    return Subject(lambda: None, tokenizer(), "m", None).tokens


@pytest.fixture(scope="module")
def ruler(data, encode):
    items, _ = generate_items(load_benchmark("ruler"), data, encode, lengths=[LENGTH])
    found = {}
    for item in items:
        found.setdefault(item.category, []).append(item)
    return found


def test_ruler_has_its_thirteen_tasks(ruler):
    assert list(ruler) == [
        "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2",
        "niah_multikey_3", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
    ]  # fmt: skip
    assert {len(items) for items in ruler.values()} == {5}
    answers = {name: len(items[0].task.reference["answers"]) for name, items in ruler.items()}
    assert answers == {
        "niah_single_1": 1, "niah_single_2": 1, "niah_single_3": 1, "niah_multikey_1": 1,
        "niah_multikey_2": 1, "niah_multikey_3": 1, "niah_multivalue": 4, "niah_multiquery": 4,
        "vt": 5, "cwe": 10, "fwe": 3, "qa_1": 1, "qa_2": 1,
    }  # fmt: skip


def test_questions_fill_their_length_in_tokens_of_the_model(ruler, encode):
    for name, items in ruler.items():
        for item in items:
            size = len(encode(item.prompt)) + 128
            assert size <= LENGTH, name
            if not name.startswith("qa"):  # these have no more documents
                assert size >= 0.95 * LENGTH, name
            assert item.cell == (name, LENGTH)


def test_needles_of_all_depths_and_lengths_stand_in_one_text(data, encode):
    items, _ = generate_items(load_benchmark("needle"), data, encode, lengths=[4096, LENGTH])
    instances = {number: [i for i in items if i.id.endswith(f"/{number}")] for number in (0, 1)}
    firsts = []
    for group in instances.values():
        assert len(group) == 22
        deep = [item.prompt[0]["content"] for item in group if item.cell[0] != "0 %"]
        assert len({text[:400] for text in deep}) == 1
        firsts.append(deep[0][:400])
    assert firsts[0] != firsts[1], "each instance has its own text"


def parts(item):
    user, assistant = item.prompt
    return user["content"], assistant["content"], item.task.reference["answers"]


WORD, UUID = r"[a-z]+-[a-z]+", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"


@pytest.mark.parametrize(
    ("name", "key", "value", "kind", "needles"),
    [
        ("niah_single_1", WORD, r"\d{7}", "number", 1),
        ("niah_single_2", WORD, r"\d{7}", "number", 1),
        ("niah_single_3", WORD, UUID, "uuid", 1),
        ("niah_multikey_1", WORD, r"\d{7}", "number", 4),
        ("niah_multikey_2", WORD, r"\d{7}", "number", None),
        ("niah_multikey_3", UUID, UUID, "uuid", None),
    ],
)
def test_needles_have_the_published_form(ruler, name, key, value, kind, needles):
    """RULER's niah.py: template, needle and the beginning of the answer, for one answer."""
    for item in ruler[name]:
        text, begun, answers = parts(item)
        match = re.fullmatch(
            rf"A special magic {kind} is hidden within the following text\. Make sure to memorize "
            rf"it\. I will quiz you about the {kind} afterwards\.\n(.*)\nWhat is the special magic "
            rf"{kind} for ({key}) mentioned in the provided text\?",
            text,
            re.S,
        )
        context, query = match.groups()
        assert begun == f"The special magic {kind} for {query} mentioned in the provided text is"
        found = re.findall(
            rf"One of the special magic {kind}s for ({key}) is: ({value})\.", context
        )
        assert len(found) == needles if needles else len(found) > 20
        assert [v for k, v in found if k == query] == answers
        if name == "niah_single_1":
            rest = re.sub(r"One of the special magic .*?\.\n?", "", context)
            noise = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and "
            assert set(rest.strip().split("\n")) == {f"{noise}back again."}


def test_several_values_and_queries_have_the_published_form(ruler):
    for name in ("niah_multivalue", "niah_multiquery"):
        places = set()
        for item in ruler[name]:
            text, begun, answers = parts(item)
            assert text.startswith(
                "Some special magic numbers are hidden within the following text"
            )
            found = re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", text)
            assert len(found) == 4
            asked = re.search(r"What are all the special magic numbers for (.*) mentioned", text)[1]
            assert begun.endswith(f"numbers for {asked} mentioned in the provided text are")
            keys = re.split(r", and |, ", asked)
            assert len(keys) == (4 if name == "niah_multiquery" else 1)
            assert set(keys) == {key for key, _ in found}
            assert sorted(answers) == sorted(value for _, value in found)
            places.add(text.index("One of the") * 10 // len(text))
        assert len(places) > 1


def test_the_chain_of_variables_can_be_followed(ruler):
    for item in ruler["vt"]:
        text, begun, answers = parts(item)
        head = (
            "Memorize and track the chain(s) of variable assignment hidden in the following text."
        )
        example, question = text.split(head)[1:]
        for part, length, right in ((example, 3, None), (question, 5, answers)):
            value = re.search(r"assigned the value (\d{5}) in the text above", part)[1]
            known = {value}
            order = []
            for name, _, source in re.findall(r"VAR ([A-Z]+) = (VAR )?([A-Z0-9]+)", part):
                assert source in known, "an assignment stands behind its source"
                known.add(name)
                order.append(name)
                assert len(name) == length
            assert len(order) == 5
            if right:
                assert order == right
            else:
                assert part.rstrip().endswith(f"they are: {' '.join(order)}")
        assert begun.endswith(f"5 variables are assigned the value {value}, they are:")


def counted(text):
    listed = text.rpartition("appear most often.\n")[2].partition("\nQuestion")[0]
    numbers, words = zip(*re.findall(r"(\d+)\. ([a-z]+)", listed))
    assert [int(n) for n in numbers] == list(range(1, len(words) + 1))
    return Counter(words)


def test_the_common_words_are_those_that_are_counted(ruler):
    for item in ruler["cwe"]:
        text, _, answers = parts(item)
        counts = counted(text)
        assert {word for word, _ in counts.most_common(10)} == set(answers)
        assert {counts[word] for word in answers} == {30}
        assert set(counts.values()) == {30, 3}
        example = text.partition("\n\n")[0]
        assert re.search(r"in the list are: 1\. [a-z]+ 2\. .* 10\. [a-z]+$", example)


def test_the_frequent_words_are_those_that_are_counted(ruler):
    for item in ruler["fwe"]:
        text, _, answers = parts(item)
        coded = text.partition("coded words. ")[2].partition("\nQuestion")[0].split(" ")
        counts = Counter(coded)
        assert counts.most_common(1)[0][0] == "..."
        assert [word for word, _ in counts.most_common(4)[1:]] == answers
        assert all(re.fullmatch("[a-z]{6}", word) for word in counts if word != "...")
        assert counts["..."] / counts[answers[0]] == pytest.approx(4, rel=0.05)


def test_documents_hold_the_answer(ruler, data):
    for name in ("qa_1", "qa_2"):
        for item in ruler[name]:
            text, begun, answers = parts(item)
            assert begun == "Answer:"
            numbers = [int(n) for n in re.findall(r"^Document (\d+):\n", text, re.M)]
            assert numbers == list(range(1, len(numbers) + 1))
            asked = re.search(r"Question: (.*)$", text)[1]
            if name == "qa_1":
                animal, town = re.search(r"legs has (\w+) of town (\d+)", asked).groups()
                assert f"{animal} has {answers[0]} legs and lives in town {town}." in text
            else:
                assert f"Hill {answers[0].split()[1]} is near." in text


def test_without_their_data_two_tasks_are_left_out(data, encode, tmp_path, capsys):
    (tmp_path / "books").symlink_to(data / "books")
    items, sums = generate_items(load_benchmark("ruler"), tmp_path, encode, lengths=[LENGTH])
    assert len({item.category for item in items}) == 11
    assert "task qa_1 is left out" in capsys.readouterr().err.replace("\n", " ")
    assert list(sums) == ["one.txt"]
    with pytest.raises(OpenQwenError, match="not at hand"):
        generate_items(load_benchmark("ruler"), tmp_path / "none", encode, lengths=[4096])


def test_a_damaged_file_of_questions_is_named(tmp_path):
    for text in ("{}", "[1]", "no", '{"data": [{}]}'):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(OpenQwenError, match="not a file of questions"):
            read_documents(tmp_path / "a.json")


def test_questions_are_those_of_the_seed_alone(data, encode):
    benchmark = load_benchmark("ruler")
    one, again, other = (
        generate_items(benchmark, data, encode, seed, [4096])[0] for seed in (0, 0, 1)
    )
    assert one == again
    assert not {str(a.prompt) for a in one} & {str(b.prompt) for b in other}
    longer = generate_items(benchmark, data, encode, 0, [4096, 6000])[0]
    assert [item for item in longer if item.cell[1] == 4096] == one, "lengths do not disturb others"


def test_the_needle_stands_at_its_depth(data, encode):
    items, _ = generate_items(load_benchmark("needle"), data, encode, lengths=[2048, 4096])
    assert len(items) == 2 * 11 * 2
    rows = list(dict.fromkeys(item.cell[0] for item in items))
    assert rows == [f"{depth} %" for depth in range(0, 101, 10)]
    for item in items:
        (message,) = item.prompt
        context = message["content"].partition("\n\n")[2].rpartition("\n\n")[0]
        city = re.search(r"house in (\w+)\? Answer", message["content"])[1]
        needle = (
            f"The number on the door of the house in {city} is {item.task.reference['answers'][0]}."
        )
        place = context.index(needle) / (len(context) - len(needle))
        assert place == pytest.approx(int(item.cell[0].split()[0]) / 100, abs=0.08)


def test_several_needles_in_two_languages(data, encode):
    items, _ = generate_items(load_benchmark("needles"), data, encode, lengths=[2048])
    for item in items:
        count, language = re.fullmatch(r"(\d) needles, (\w+)", item.category).groups()
        text, answers = item.prompt[0]["content"], item.task.reference["answers"]
        assert len(answers) == int(count)
        assert all(answer in text for answer in answers)
        if language == "Chinese":
            assert "门牌号是" in text
            assert not re.search(r"[。，] [\u4e00-\u9fff]", text), "no spaces between sentences"
            cities = re.search(r"\n\n(.*)的房子，", text)[1].split("、")
            assert len(cities) == int(count)
            told = [re.search(f"{city}那座房子的门牌号是(\\d+)", text)[1] for city in cities]
            assert told == answers


@pytest.mark.parametrize("seed", range(8))
def test_as_much_context_as_fits(seed):
    """Against trying every number of units."""
    rng = np.random.default_rng(seed)
    sizes = np.cumsum(rng.integers(1, 60, size=3000)) + int(rng.integers(0, 300))
    calls = []

    class Units:
        least, most = 2, 2500

    def tokens(n):
        calls.append(n)
        return int(sizes[n])

    for room in (int(rng.integers(10, 90_000)), 10**9, int(sizes[2]), int(sizes[2]) - 1):
        calls.clear()
        fits = [n for n in range(2, 2501) if sizes[n] <= room]
        n = fitting(Units, tokens, room)
        assert len(calls) <= 22
        if not fits:
            assert n is None
            continue
        assert sizes[n] <= room
        assert n == max(fits) or room - sizes[n] <= room // 500


def test_answers_that_contain_texts():
    def graded(answer, answers, match="all"):
        task = Task(
            "t",
            [{"role": "user", "content": "?"}],
            "contains",
            {"answers": answers, "match": match},
        )
        return grade([task], [answer])[0]

    half = graded("It is 12 and\nno more", ["12", "34"])
    assert (half.score, half.passed, half.reason) == (0.5, False, "missing: 34")
    assert graded("THE  Blue\nhill", ["blue hill"]).passed
    assert graded("x 34", ["12", "34"], "any").passed
    assert not graded("x", ["12", "34"], "any").passed
    assert graded("北 京 市", ["北京"]).passed
    keywords = graded("She met Ann, in a well.", ["Ann Lee of the Well"], "keywords")
    # "ann" and "well" of "ann", "lee", "of", "well"; "of" can never be found, as in LV-Eval.
    assert keywords.score == 0.5
    assert graded("他叫李白。", ["李白诗"], "keywords").score == pytest.approx(2 / 3)
    for answers in ([], [" "], "x", [3]):
        with pytest.raises(OpenQwenError, match="answers"):
            graded("x", answers)


def subject(network, folder, context=None):
    words = tokenizer()
    engine = Engine(network, words, EngineConfig(max_context=context))
    return Subject(lambda: engine, words, f"m {context}", ReplyCache(folder / "replies.jsonl"))


def test_ways_to_read_a_length():
    network = model()
    window = network.config.max_position_embeddings
    for name in ("plain", "yarn", "dca"):
        assert Reading(name, network.config).way(window) == LongContext()
    assert Reading("plain", network.config).way(window + 1) == LongContext()
    yarn = Reading("yarn", network.config).way(2 * window + 1).yarn
    assert (yarn.factor, yarn.original_max_position_embeddings) == (4.0, window)
    way = Reading("dca", network.config).way(2 * window)
    assert way.dual_chunk.chunk_size == window
    assert way.tokens == 2 * window


def test_readings_differ_beyond_the_window_alone(data, tmp_path):
    network = model(2)
    benchmark = load_benchmark("positions")
    inside, outside = {}, {}
    for length, found in ((1024, inside), (4096, outside)):
        for name in ("plain", "yarn", "dca"):
            asked = subject(network, tmp_path, 4096)
            items, _ = generate_items(benchmark, data, asked.tokens, lengths=[length])
            options = BenchmarkOptions(reading=Reading(name, network.config))
            scores, rows = run_benchmark(benchmark, items, asked, options)
            found[name] = [row["nats"] for row in rows]
            assert scores["reading"] == name
    assert inside["plain"] == inside["yarn"] == inside["dca"]
    assert len({json.dumps(nats) for nats in outside.values()}) == 3


def test_perplexity_by_position_is_that_of_one_plain_pass(data, tmp_path):
    network, asked = model(3), None
    asked = subject(network, tmp_path)
    benchmark = load_benchmark("positions")
    items, _ = generate_items(benchmark, data, asked.tokens, lengths=[1024])
    scores, rows = run_benchmark(benchmark, items, asked, BenchmarkOptions())
    assert [len(item.ids) for item in items] == [1022] * 4
    sums = np.zeros(3)
    for item, row in zip(items, rows, strict=True):
        ids = torch.tensor([tokenizer().endoftext_id, *item.ids])
        packed = Packed.from_lengths([len(ids) - 1])
        with torch.no_grad():
            logits = network.logits(network(ids[:-1], packed.positions, packed)).double()
        nats = -torch.log_softmax(logits, -1).gather(1, ids[1:, None]).squeeze(1).numpy()
        wanted = [nats[:256].sum(), nats[256:512].sum(), nats[512:].sum()]
        assert [part[2] for part in row["nats"]] == pytest.approx(wanted, abs=1e-2)
        assert row["score"] == pytest.approx(math.exp(-nats.mean()), rel=1e-4)
        sums += wanted
    counts = [1024, 1024, 4 * 510]
    assert [one["end"] for one in scores["positions"]] == [256, 512, 1022]
    assert [one["perplexity"] for one in scores["positions"]] == pytest.approx(
        [math.exp(s / n) for s, n in zip(sums, counts)], rel=1e-4
    )


def test_one_command_draws_all_ways_in_one_picture(data, tmp_path, capsys):
    save_checkpoint(model(5), tokenizer(), tmp_path / "m", chat=True)
    words = ["evaluate", str(tmp_path / "m"), "--data", str(data), "--tasks", "needle,positions"]
    words += ["--lengths", "1k,3k", "--limit", "30", "--max-tokens", "2"]
    words += ["--long-context", "plain,yarn,dca", "--output", str(tmp_path / "out")]
    assert openqwen.cli.main(words) == 0, capsys.readouterr().err
    evaluation = read_evaluation(tmp_path / "out")
    names = [
        f"{name}@{way}" for name in ("needle", "positions") for way in ("plain", "yarn", "dca")
    ]
    assert list(evaluation.scores) == names
    row = evaluation.rows("needle@yarn")[0]
    assert row["cell"][1] in (1024, 3072)
    page = (tmp_path / "out/report.html").read_text()
    assert page.count('class="heat map"') == 3
    for text in ("Long context", "<caption>yarn</caption>", "Perplexity by position", ">3k</th>"):
        assert text in page
    within = [*words[:4], "--tasks", "needle", "--lengths", "1k", "--limit", "3"]
    assert openqwen.cli.main([*within, "--max-tokens", "2", "--output", words[-1]]) == 0
    page = (tmp_path / "out/report.html").read_text()
    assert page.count('class="heat map"') == 4, "the maps of the earlier run stay beside it"
    assert "<caption>as the engine chooses</caption>" in page


def test_lengths_beyond_the_context_are_left_out_and_told(tmp_path, capsys):
    save_checkpoint(model(5), tokenizer(), tmp_path / "m", chat=True)
    benchmark = load_benchmark("ruler")
    plan = plan_lengths([benchmark], str(tmp_path / "m"), "", "")
    assert (plan.lengths(benchmark), plan.max_context) == ([2048], None)
    assert "lengths beyond 2,048 tokens are left out" in capsys.readouterr().err
    plan = plan_lengths([benchmark], str(tmp_path / "m"), "1k,8k", "")
    assert (plan.lengths(benchmark), plan.max_context) == ([1024, 8192], 8192)
    with pytest.raises(OpenQwenError, match="Did you mean 'yarn'"):
        plan_lengths([benchmark], str(tmp_path / "m"), "", "yran")
    with pytest.raises(OpenQwenError, match="server decides"):
        plan_lengths([benchmark], None, "", "yarn")


def test_books_stop_where_there_is_enough():
    books = Books.of([book(300), book(300, 1)], 500)
    assert sum(map(len, books.sentences)) < 700
    assert Books.of(["一。二！\n\n三? Four. Five"], 99).sentences == [
        "一。",
        "二！",
        "三?",
        "Four.",
        "Five",
    ]
