"""AutoIF with scripted answers: each gate keeps and drops what it must; functions stay inside."""

import json

import pytest
from scripted import Scripted, number, records, run

from openqwen.engine import Output
from openqwen.instruct.synthesize.methods.instructions import Instructions, InstructionsConfig
from openqwen.sandbox import Pool, best_tier
from openqwen.support.errors import OpenQwenError

NO_COMMA, SHORT, LOUD = "Use no comma.", "Use at most five words.", "Write in capital letters."
QUERIES = ["Where is the big river?", "Who wrote this long book?", "How does a clock work?"]
GOOD = {
    NO_COMMA: "',' not in response",
    SHORT: "len(response.split()) <= 5",
    LOUD: "response.isupper()",
}
CASES = {
    NO_COMMA: [("It is here", True), ("Well, no", False)],
    SHORT: [("Two words", True), ("one two three four five six", False)],
    LOUD: [("AH", True), ("Ah", False)],
}
TOLD = {
    NO_COMMA: "Leave commas out.",
    SHORT: "Keep to five words or fewer.",
    LOUD: "Use capitals.",
}
ANSWERS = ["It is in the far, far north", "NOBODY KNOWS", "It ticks, they say", "Far north"]


def code(body, cases):
    listed = json.dumps([{"response": text, "expected": truth} for text, truth in cases])
    source = body if "def evaluate" in body else f"def evaluate(response):\n    return {body}"
    return f"```python\n{source}\n```\n```json\n{listed}\n```"


class Model:
    """Answers each of the method's prompts; a test replaces one of the answers."""

    def __init__(self, **replaced):
        self.replaced = replaced

    def __call__(self, text, seed):
        for name, mark in (
            ("expand", "Write one constraint a line"),
            ("verify", "Write a Python function"),
            ("verify", "Write such a list"),
            ("describe", "Which constraint is it?"),
            ("entail", "Constraint B:"),
            ("match", "How well does the answer fit"),
        ):
            if mark in text:
                return self.replaced.get(name, getattr(self, name))(text, seed)
        return self.replaced.get("respond", self.respond)(text, seed)

    def expand(self, text, seed):
        return "- Use the word 'moon' twice.\n- Use no comma.\n- " + "x" * 400

    def verify(self, text, seed):
        constraint = next((c for c in GOOD if c in text), None)
        return code(GOOD[constraint], CASES[constraint]) if constraint else "I do not know."

    def describe(self, text, seed):
        return next(TOLD[c] for c, body in GOOD.items() if body in text)

    def entail(self, text, seed):
        return "entailment"

    def respond(self, text, seed):
        return ANSWERS[number(text, seed) % len(ANSWERS)]

    def match(self, text, seed):
        return "Score: 9"


def method(tmp_path, **settings):
    queries, seeds = tmp_path / "queries.jsonl", tmp_path / "seeds.txt"
    long = [{"prompt": "Hi"}, {"prompt": "Tell me " + "all " * 100}]
    queries.write_text(
        "".join(json.dumps(q) + "\n" for q in [*long, *({"prompt": q} for q in QUERIES)])
    )
    seeds.write_text("\n".join(GOOD))
    given = {"constraints": seeds, "rounds": 0, "queries": 3, "responses": 4, "generations": 3}
    config = InstructionsConfig(**{**given, **settings})
    return Instructions(config, queries), config


def make(tmp_path, model=None, **settings):
    tmp_path.mkdir(exist_ok=True)
    made, config = method(tmp_path, **settings)
    generator = Scripted(model or Model())
    _, found = run(tmp_path / "run", generator, config, made)
    gates = {
        k: (g["passed"], g["of"]) for k, g in json.loads(found["synthesis.json"])["gates"].items()
    }
    return found, gates, generator


def test_the_whole_chain(tmp_path):
    found, gates, _ = make(tmp_path)
    d, p = records(found, "demonstrations"), records(found, "preferences")
    assert gates["has a function"] == gates["has cases"] == (9, 9)
    # The same function three times is one function.
    assert gates["function agrees with cases"] == gates["constraint is verified"] == (3, 3)
    assert gates["case agrees with functions"] == (6, 6)
    assert gates["back-translation agrees"] == (3, 3)
    assert gates["response is usable"] == (36, 36)
    right = {
        NO_COMMA: lambda text: "," not in text,
        SHORT: lambda text: len(text.split()) <= 5,
        LOUD: str.isupper,
    }
    assert {r["origin"]["constraint"] for r in d} == set(right)
    for record in d:
        question, answer = (m["content"] for m in record["messages"])
        query, constraint = question.split("\n\n")
        assert query in QUERIES
        assert right[constraint](answer)
        place, parent = record["origin"]["parents"]
        assert place == f"constraint-{list(GOOD).index(constraint)}"
        assert parent == f"queries.jsonl#{QUERIES.index(query) + 3}"
        assert record["origin"]["match"] == 9
        assert {"function.en", "cases.en"} <= set(record["origin"]["prompts"])
    assert p
    for record in p:
        constraint = record["prompt"][0]["content"].split("\n\n")[1]
        assert right[constraint](record["chosen"][0]["content"])
        assert not right[constraint](record["rejected"][0]["content"])


def test_self_instruct_adds_what_is_new(tmp_path):
    _, gates, generator = make(tmp_path, rounds=2, per_round=7)
    assert gates["has new constraints"] == (2, 2)
    assert gates["is a new constraint"] == (1, 6)  # once; known; too long
    assert gates["constraint is verified"] == (3, 4)  # the model cannot check the new one
    asked = [text for text, _ in generator.asked if "Write one constraint a line" in text]
    assert all("Write 7 new constraints" in text for text in asked)
    assert all(1 <= sum(seed in text for seed in GOOD) < len(GOOD) for text in asked)


def test_no_list_of_constraints_is_no_end(tmp_path):
    found, gates, _ = make(tmp_path, Model(expand=lambda *_: "Sorry."), rounds=2)
    assert gates["has new constraints"] == (0, 2)
    assert len(records(found, "demonstrations")) > 5


def test_a_case_that_functions_disagree_with_is_dropped_and_so_is_a_bad_function(tmp_path):
    wrong = "',' in response"

    bodies = [GOOD[NO_COMMA], wrong, "response.count(',') == 0"]

    def three(text, seed):
        if NO_COMMA not in text:
            return ""
        body = bodies.pop() if "Write a Python function" in text else "True"
        return code(body, [*CASES[NO_COMMA], ("a, b", True)])

    _, gates, _ = make(tmp_path, Model(verify=three, describe=lambda *_: "No comma."))
    assert gates["function agrees with cases"] == (2, 3)
    assert gates["case agrees with functions"] == (2, 3)
    assert gates["constraint is verified"] == (1, 3)


def test_functions_must_say_no_to_something_where_contrast_is_demanded(tmp_path):
    lazy = Model(
        verify=lambda *_: code("True", [("a", True), ("b", False)]), describe=lambda *_: "Do."
    )
    _, gates, _ = make(tmp_path / "paper", lazy)
    assert gates["constraint is verified"] == (3, 3)
    _, gates, _ = make(tmp_path / "strict", lazy, contrast=True)
    assert gates["constraint is verified"] == (0, 3)


def test_the_cases_of_the_prompt_are_none_of_the_constraint(tmp_path):
    shown = [("The river Nile is the longest river.", True), ("I like to sail.", False)]
    model = Model(verify=lambda *_: code("True", [*shown, ("a", True)]), describe=lambda *_: "Do.")
    _, gates, _ = make(tmp_path, model)
    assert gates["case agrees with functions"] == (3, 3)


def test_the_least_numbers_of_functions_and_cases(tmp_path):
    _, gates, _ = make(tmp_path / "f", least_functions=2)  # the same function is counted once
    assert gates["constraint is verified"] == (0, 3)
    _, gates, _ = make(tmp_path / "c", least_cases=3)
    assert gates["constraint is verified"] == (0, 3)
    _, gates, _ = make(tmp_path / "ok", least_cases=2)
    assert gates["constraint is verified"] == (3, 3)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("entailment", 3),
        ("Neutral.", 3),
        ("contradiction", 0),
        ("nonsense", 0),
        ("", 0),
        ("矛盾", 0),
    ],
)
def test_back_translation(tmp_path, said, kept):
    found, gates, _ = make(tmp_path, Model(entail=lambda *_: said))
    assert gates["back-translation agrees"] == (kept, 3)
    assert bool(records(found, "demonstrations")) == bool(kept)


def test_back_translation_can_be_left_out_and_needs_a_description(tmp_path):
    silent = Model(describe=lambda *_: Output("for ever", finish_reason="length"))
    _, gates, _ = make(tmp_path / "silent", silent)
    assert gates["back-translation agrees"] == (0, 3)
    _, gates, _ = make(tmp_path / "off", silent, back_translations=0)
    assert gates["back-translation agrees"] == (3, 3)


@pytest.mark.parametrize(
    ("said", "kept"), [("Score: 8", True), ("Score: 7", False), ("Good!", False)]
)
def test_the_match_with_the_query(tmp_path, said, kept):
    found, gates, _ = make(tmp_path, Model(match=lambda *_: said))
    passed, tried = gates["response matches query"]
    assert (passed == tried) is kept
    assert (passed > 0) is kept
    assert bool(records(found, "demonstrations")) is bool(records(found, "preferences")) is kept


@pytest.mark.parametrize(
    "said",
    [
        "",
        " \n ",
        "ABC " * 200,
        Output("NEVER ENDS", finish_reason="length"),
        lambda text: text,
        lambda text: text.split("\n\n")[0],
    ],
)
def test_responses_that_are_empty_endless_or_copied(tmp_path, said):
    model = Model(respond=lambda text, seed: said(text) if callable(said) else said)
    found, gates, _ = make(tmp_path, model)
    assert gates["response is usable"] == (0, 36)
    assert not records(found, "demonstrations") + records(found, "preferences")


HOSTILE = {
    "reads a file": "import os\ndef evaluate(response):\n    return os.path.exists({mark!r})",
    "writes a file": "def evaluate(response):\n    open({mark!r}, 'w').write('x')\n    return True",
    "at import": "x = open({mark!r}, 'w').write('x')\ndef evaluate(response):\n    return True",
    "network": "import socket\ndef evaluate(response):\n    socket.create_connection(('1.1.1.1', 53), 1)\n    return True",
    "exit": "import os\ndef evaluate(response):\n    os._exit(0)",
    "forged marks": "import os\nx = os.write(1, b'1' * 99)\ndef evaluate(response):\n    os._exit(0)",
    "flood": "def evaluate(response):\n    import os\n    while True: os.write(1, b'1' * 65536)",
    "memory": "def evaluate(response):\n    return len('x' * 10**10) > 0",
    "endless": "def evaluate(response):\n    while True: pass",
    "fork bomb": "import os\ndef evaluate(response):\n    while True: os.fork()",
    "recursion": "def evaluate(response):\n    return evaluate(response)",
    "no truth": "def evaluate(response):\n    return 'yes'",
    "raises": "def evaluate(response):\n    raise SystemExit",
    "lies about equality": "class T:\n    def __eq__(self, o): return True\ndef evaluate(response):\n    return T()",
}


@pytest.mark.skipif(best_tier() != "strict", reason="needs the strict sandbox")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_functions_stay_in_the_sandbox_and_say_nothing(tmp_path, name):
    mark = tmp_path / "mark"
    if name == "reads a file":
        mark.write_text("secret")
    source = HOSTILE[name].format(mark=str(mark))
    model = Model(verify=lambda *_: code(source, [("a", True), ("b, c", True)]))
    found, gates, _ = make(tmp_path, model, seconds=0.3)
    assert gates["case agrees with functions"] == (0, 6)
    assert not records(found, "demonstrations")
    assert mark.exists() is (name == "reads a file")


def test_functions_are_asked_again_behind_a_text_on_which_they_hang():
    from openqwen.instruct.synthesize.verification import outcomes

    class Work:
        def run(self, programs):
            with Pool(2, tier="process" if best_tier() == "process" else "strict") as pool:
                return pool.run(programs)
            yield

    picky = (
        "def evaluate(response):\n    while response == 'hang': pass\n    return response == 'yes'"
    )
    sad = (
        "import os\ndef evaluate(response):\n    if response == 'die': os._exit(1)\n    return True"
    )
    drunk = "import random\ndef evaluate(response):\n    return random.random() < 0.5"
    texts = ["yes", "hang", "no", "die", "yes"]
    steps = outcomes(Work(), [picky, sad, drunk], texts, 0.3)
    with pytest.raises(StopIteration) as ended:
        next(steps)
    rows = ended.value.value
    assert rows[0] == [True, None, False, False, True]
    assert rows[1] == [True, True, True, None, True]
    assert len(set(rows[2])) == 1  # the same draw each time


def test_the_order_in_which_answers_come_changes_no_byte(tmp_path):
    found = []
    for concurrency in (1, 7):
        limits = {"concurrency": concurrency}
        found.append(make(tmp_path / str(concurrency), rounds=1, limits=limits)[0])
    assert found[0] == found[1]


def test_no_query_of_that_length(tmp_path):
    with pytest.raises(OpenQwenError, match="No query has 500 to 600 characters"):
        method(tmp_path, shortest=500, longest=600)


def test_chinese(tmp_path):
    def model(text, seed):
        if ("Python 函数" in text and "约束是什么" not in text) or "写这样一个列表" in text:
            return code("'，' not in response", [("好", True), ("好，好", False)])
        for mark, said in (
            ("这个约束是什么", "不用逗号"),
            ("约束 B", "蕴含"),
            ("得分：N", "得分：9"),
        ):
            if mark in text:
                return said
        return ["在北方", "在北方，很远"][number(text, seed) % 2]

    found, gates, _ = make(tmp_path, model, language="zh")
    assert gates["back-translation agrees"] == (3, 3)
    assert records(found, "demonstrations")
    assert records(found, "preferences")
