"""A benchmark as a TOML file: its data, how a question is asked, how an answer is graded.

Texts of a prompt are Jinja templates; what gives a value (a reference, a list of choices) is a
Jinja expression. Both run in Jinja's sandbox and see a record's fields by their names, and:
    record      all fields, for names that are no identifiers: record["Correct Answer"]
    file        name of the record's file up to its first dot; filename: its whole name; folder:
                name of the file's folder
    number      number of the record in its file, from 1; part: "test" or "shots"
    category    what `category` gives
    beside      the text of the file that `data.beside` names
    shuffled    the list of `shuffle` in random order; place: where its first element is now
    letters     "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    each        an element of `data.each`; turn: number of the user's message, from 1
    NAME        for each of `data.tables`, its records by their keys: NAME[question_id].answer
Filters beside Jinja's: sub(pattern, text), python (a Python literal), from_json, boxed, unpacked
(LiveCodeBench's packed tests as a text).
"""

import base64
import re
import tomllib
import zlib
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from pickletools import genops
from typing import Annotated, Any, Literal

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import AfterValidator, Field, model_validator

from openqwen.support.errors import OpenQwenError, suggestion
from openqwen.support.files import parse_json
from openqwen.support.settings import Settings, validate
from openqwen.tasks import GRADERS, READERS
from openqwen.tasks.numbers import last_boxed

FOLDER = Path(__file__).with_name("benchmarks")
# The reports with the published scores, by the beginning of the suite's name.
REPORTS = {
    "qwen2.5-coder": "Qwen2.5-Coder Technical Report, arXiv 2409.12186",
    "qwen2.5": "Qwen2.5 Technical Report, arXiv 2412.15115",
    "qwen2": "Qwen2 Technical Report, arXiv 2407.10671",
}
Render = Callable[..., Any]
_LARGEST = 2**28  # bytes of a packed text


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {
        "sub": lambda text, pattern, new: re.sub(pattern, new, text),
        "python": repr,
        "from_json": lambda text: parse_json(text),
        "boxed": last_boxed,
        "unpacked": unpacked,
    }
    return environment


def unpacked(text: str) -> str:
    """A text as LiveCodeBench packs its private tests: base64 of zlib of a pickled text.

    The pickle is only looked through for its text, never run. A text that is not packed stays.
    """
    if text.lstrip().startswith("["):
        return text
    packed = base64.b64decode(text, validate=True)
    data = zlib.decompressobj().decompress(packed, _LARGEST)
    for _, value, _ in genops(data):
        if isinstance(value, str):
            return value
    raise ValueError("there is no text in it")


@cache
def template(text: str) -> Render:
    """A template as a function of its variables that returns a text."""
    return _environment().from_string(text).render


@cache
def expression(text: str) -> Render:
    """An expression as a function of its variables that returns a value."""
    return _environment().compile_expression(text, undefined_to_none=False)


def _read_by(reader: Callable[[str], Any], kind: str) -> AfterValidator:
    """The check that a text, unless it is empty, is one of that kind."""

    def check(text: str) -> str:
        try:
            if text:
                reader(text)
        except (TemplateSyntaxError, re.error) as error:
            raise ValueError(f"this is no {kind}: {error}") from None
        return text

    return AfterValidator(check)


def _one_of(known: Collection[str], kind: str) -> AfterValidator:
    def check(name: str) -> str:
        if name and name not in known:
            near = suggestion(name, known).strip() or f"known: {', '.join(known)}"
            raise ValueError(f"there is no {kind} '{name}' ({near})")
        return name

    return AfterValidator(check)


JinjaText = Annotated[str, _read_by(template, "Jinja template")]
JinjaValue = Annotated[str, _read_by(expression, "Jinja expression")]


class BenchmarkTable(Settings):
    """A file whose records are looked up by a key, such as reference answers."""

    files: list[str] = Field(
        min_length=1, description="patterns of paths below the data folder; the first that fits"
    )
    key: JinjaValue = Field(description="expression of a record's key")


class BenchmarkData(Settings):
    """The files of a benchmark, in the form in which it is published."""

    test: list[str] = Field(
        min_length=1,
        description="patterns of paths below the data folder, or hub:owner/name:split; the first "
        "pattern that fits is read",
    )
    shots: list[str] = Field([], description="the same, for solved examples")
    records: JinjaValue = Field(
        "", description="expression for the records of a JSON file, its `root`"
    )
    columns: list[str] = Field([], description="columns of a CSV or TSV file without a header")
    lines: bool = Field(
        False, description="each line of a file is a record: its `text`, and its `number` from 1"
    )
    keep: JinjaValue = Field(
        "", description="expression; records for which it is false are left out"
    )
    each: JinjaValue = Field(
        "", description="expression of a list; a record is one question for each element, `each`"
    )
    tables: dict[str, BenchmarkTable] = Field({}, description="name -> a file of records by key")
    beside: JinjaText = Field(
        "", description="template of the path of a text file for each data file"
    )
    sha256: dict[str, str] = Field({}, description="file name -> checksum of the known file")


class BenchmarkPrompt(Settings):
    """How a question is asked."""

    form: Literal["chat", "base"] = Field("chat", description="a chat, or a text to continue")
    system: JinjaText = Field("", description="template of the system message")
    head: JinjaText = Field("", description="template before the first example or question")
    question: JinjaText = Field("", description="template of a question")
    turns: JinjaValue = Field(
        "", description="expression of a list: the user's messages after the first answer"
    )
    example: JinjaText = Field("", description="template of the answer of a solved example")
    separator: str = Field("\n\n", description="between two examples of a text")
    shots: int = Field(0, ge=0, description="solved examples, the first of the same category")
    prefill: JinjaText = Field("", description="template of how the assistant's answer begins")


class BenchmarkAnswer(Settings):
    """How a generated answer ends and is graded."""

    max_tokens: int = Field(1024, ge=1, description="most tokens of an answer")
    stop: list[str] = Field([], description="texts that end an answer")
    stops: JinjaValue = Field("", description="expression of a list: more of them, by the record")
    extract: Annotated[str, _read_by(re.compile, "regular expression")] = Field(
        "",
        description="regular expression; the first group of its last match is graded, and an "
        "answer without a match has no result",
    )
    first: bool = Field(False, description="extract the first match in place of the last")
    reader: Annotated[str, _one_of(READERS, "reader")] = Field(
        "", description="reader of tasks/ that gives grader and reference"
    )
    grader: Annotated[str, _one_of(GRADERS, "grader")] = Field("", description="grader of tasks/")
    reference: dict[str, JinjaValue] = Field(
        {}, description="expressions of the grader's reference"
    )
    libraries: dict[str, str] = Field(
        {}, description="language of programs -> a file that they need; without it they are not run"
    )
    temperature: JinjaValue = Field(
        "", description="expression of the temperature, in place of --temperature"
    )
    baseline: str = Field("", description="whose answers a judge compares with (pairwise)")
    metric: Literal["accuracy", "score", "rating", "pairwise", "bleu"] = Field(
        "accuracy",
        description="mean of right and wrong; of the grader's scores; of a judge's ratings as a "
        "share of the highest; win rate against the baseline; BLEU of each category as a whole",
    )


class BenchmarkChoices(Settings):
    """Choices that are compared by their log-likelihood after the prompt."""

    options: JinjaValue = Field(description="expression: the continuations")
    contexts: JinjaValue = Field(
        "", description="expression: ends of the prompt, one for each option"
    )
    correct: JinjaValue = Field(
        description="expression: the index of the right option, or a list of 0 and 1"
    )
    metric: Literal["accuracy", "accuracy_norm", "mass"] = Field(
        "accuracy",
        description="accuracy: the likeliest option; accuracy_norm: likeliest by character; mass: "
        "share of probability on right options",
    )


class LongTask(Settings):
    """One kind of generated question; templates see context, query, count and each answer."""

    name: str
    kind: Literal["needles", "variables", "common_words", "frequent_words", "documents"]
    question: JinjaText = Field(description="template of the question with its context")
    answer: JinjaText = Field("", description="template of how the assistant's answer begins")
    books: list[str] = Field([], description="patterns of files in place of those of data.test")
    language: Literal["en", "zh"] = "en"
    example: bool = Field(False, description="one short solved example before the question")
    haystack: Literal["books", "noise", "needles"] = "books"
    needle: JinjaText = Field(
        "One of the special magic numbers for {{ key }} is: {{ value }}.",
        description="template of a needle with its `key` and `value`",
    )
    keys: list[str] | Literal["words", "uuids"] = "words"
    values: list[str] | Literal["words", "numbers", "uuids"] = "numbers"
    key_count: int = Field(1, ge=1, description="different keys")
    value_count: int = Field(1, ge=1, description="needles of each key")
    query_count: int = Field(1, ge=1, description="keys that are asked for")
    depths: list[float] = Field(
        [], description="places of the one needle in per cent of the context; none: at random"
    )
    match: Literal["all", "any"] = Field("all", description="see the grader `contains`")


class BenchmarkGenerate(Settings):
    """Questions that are generated in wanted lengths from books, which `data` names."""

    lengths: list[int] = Field(min_length=1, description="tokens of a question with its answer")
    samples: int = Field(1, ge=1, description="questions of each task, length and depth")
    tasks: list[LongTask] = Field(min_length=1)


class BenchmarkPositions(Settings):
    """The probability of a text's tokens by their position; score: 1 / perplexity."""

    lengths: list[int] = Field(min_length=1, description="tokens of a text")
    samples: int = Field(4, ge=1, description="texts of each length")


class Benchmark(Settings):
    """One benchmark in one protocol."""

    name: str
    title: str = Field(description="as people write it")
    licence: str = Field(description="of the data")
    source: str = Field(description="paper or repository of the data")
    get: str = Field(description="where to get the data, and the place of its files")
    protocol: str = Field(description="one sentence")
    protocol_source: str = Field(description="where the protocol is from")
    id: JinjaValue = Field("", description="expression of a record's id; default: file/number")
    category: JinjaValue = Field(
        "", description="expression of the group in which a record is counted"
    )
    shuffle: JinjaValue = Field("", description="expression of a list to shuffle")
    data: BenchmarkData
    prompt: BenchmarkPrompt = Field(default_factory=lambda: BenchmarkPrompt())
    answer: BenchmarkAnswer | None = None
    choices: BenchmarkChoices | None = None
    generate: BenchmarkGenerate | None = None
    positions: BenchmarkPositions | None = None
    published: dict[str, dict[str, float]] = Field(
        {}, description="suite -> size of a model -> score in per cent"
    )

    @property
    def long(self) -> BenchmarkGenerate | BenchmarkPositions | None:
        """What generates its texts in wanted lengths; None where they are published."""
        return self.generate or self.positions

    @property
    def judged(self) -> bool:
        """Whether a judge grades the answers."""
        return bool(self.answer and self.answer.grader and GRADERS[self.answer.grader].asks)

    @model_validator(mode="after")
    def _check(self) -> "Benchmark":
        forms = (self.answer, self.choices, self.positions)
        if sum(form is not None for form in forms) != 1:
            raise ValueError("give one of the tables [answer], [choices] and [positions]")
        if self.generate and not self.answer:
            raise ValueError("the table [generate] needs [answer]")
        if not (self.prompt.question or self.long):
            raise ValueError("'prompt.question' is missing")
        if self.prompt.prefill and self.prompt.form == "base":
            raise ValueError("'prompt.prefill' is for the form \"chat\"")
        if self.prompt.shots and not (self.data.shots and self.prompt.example):
            raise ValueError("'prompt.shots' needs 'data.shots' and 'prompt.example'")
        graded = self.answer and not self.generate
        if graded and self.answer and bool(self.answer.reader) == bool(self.answer.grader):
            raise ValueError("give one of 'answer.reader' and 'answer.grader'")
        if self.answer and (self.answer.grader == "pairwise") != (self.answer.metric == "pairwise"):
            raise ValueError('the grader "pairwise" and the metric "pairwise" need each other')
        if self.answer and self.answer.metric == "bleu" and self.answer.grader != "translation":
            raise ValueError('the metric "bleu" needs the grader "translation"')
        if self.prompt.turns and (self.prompt.form == "base" or self.answer is None):
            raise ValueError("'prompt.turns' is for the form \"chat\" and the table [answer]")
        return self


def evaluated(render: Render, values: dict[str, Any], key: str, where: str) -> Any:
    """What a template or an expression gives for a record; errors name the key and the record."""
    try:
        value = render(values)
        if isinstance(value, StrictUndefined):
            str(value)  # raises
        return value
    except Exception as error:  # a template is a program: it may raise anything
        message = str(error) or type(error).__name__
        near = ""
        if isinstance(error, TemplateError) and (missing := re.match("'(\\w+)' is unde", message)):
            near = suggestion(missing[1], values["record"])
            near += f" The record has: {', '.join(map(str, values['record']))}."
        what = f"'{key}' cannot be computed: {message}.{near}"
        do = "correct the benchmark file, or give a data file of the form that it names"
        raise OpenQwenError(what, where, do) from None


def names() -> list[str]:
    """The names of the benchmarks of the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_benchmark(name: str) -> Benchmark:
    """The benchmark of that name in the package, or in a TOML file.

    A file may begin with `extends = "NAME"`: its keys then change those of that benchmark.

    Raises:
        OpenQwenError: there is none, or a key of its file is wrong; names the nearest.
    """
    path = Path(name)
    if not (path.suffix == ".toml" and path.is_file()):
        path = FOLDER / f"{name}.toml"
        if name not in names():
            what = f"There is no benchmark '{name}'.{suggestion(name, [*names(), *suites()])}"
            raise OpenQwenError(what, do="name a benchmark of --list, a suite, or a TOML file")
    return validate(Benchmark, {"name": path.stem, **_table(path)}, path)


def _table(path: Path, depth: int = 3) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OpenQwenError(f"This is not valid TOML: {error}.", path) from None
    if "extends" not in table:
        return table
    name = str(table.pop("extends"))
    if name not in names() or not depth:
        what = f"'extends' names no benchmark: '{name}'.{suggestion(name, names())}"
        raise OpenQwenError(what, path, "name one of --list")
    parent = _table(FOLDER / f"{name}.toml", depth - 1)
    parent.pop("published", None)
    for one, other in (("answer", "choices"), ("choices", "answer")):
        if one in table:
            parent.pop(other, None)
    for key, value in table.items():
        whole = not isinstance(value, dict) or key == "published"
        parent[key] = value if whole else {**parent.get(key, {}), **value}
    return parent


def suites() -> list[str]:
    """The suites: names under which benchmarks have published scores."""
    return sorted({suite for name in names() for suite in load_benchmark(name).published})


def select(text: str) -> list[Benchmark]:
    """The benchmarks of a list such as "humaneval,gsm8k", "qwen2.5-instruct", "all", "my.toml"."""
    chosen: dict[str, Benchmark] = {}
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name == "all" or name in suites():
            for one in map(load_benchmark, names()):
                if name == "all" or name in one.published:
                    chosen[one.name] = one
        else:
            one = load_benchmark(name)
            chosen[one.name] = one
    if not chosen:
        do = "give --tasks with benchmarks, a suite or 'all'; --list shows them"
        raise OpenQwenError("No benchmark is named.", do=do)
    return list(chosen.values())
