"""Benchmarks whose questions are generated in wanted lengths, and ways to read such lengths."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openqwen.evaluate.benchmark import Benchmark, LongTask, evaluated, template
from openqwen.evaluate.haystack import (
    NOISE,
    Books,
    Documents,
    Draws,
    Filling,
    Needles,
    Values,
    common_words,
    fitting,
    frequent_words,
    variables,
)
from openqwen.evaluate.items import BenchmarkItem, checksums, matching, missing_data
from openqwen.model import LongContext, ModelConfig, load_model
from openqwen.model.long_context import (
    DualChunk,
    Yarn,
    context_tokens,
    stated_context,
    trained_window,
)
from openqwen.support.errors import OpenQwenError, suggestion
from openqwen.support.files import open_binary, parse_json
from openqwen.support.generators import Generators
from openqwen.support.progress import notice, progress
from openqwen.support.records import read_records
from openqwen.tasks import Task

READINGS = ("plain", "yarn", "dca")
_CHARACTERS = 12  # of books for each token of the longest context, so that samples differ
_LEAST_BOOKS = 3_000_000  # characters: the words of fewer are too few for RULER's lists
_MOST_DEPTHS = 40  # RULER's places of needles
Encode = Callable[[Any], Sequence[int]]


@dataclass(frozen=True)
class Reading:
    """How sequences beyond the trained window are read: "plain", "yarn" or "dca".

    Within the window all are the same. yarn: YARN with the smallest power of two that covers the
    length. dca: Dual Chunk Attention with YARN's scale of queries, as Qwen2.5 is served.
    """

    name: str
    config: ModelConfig

    def way(self, length: int) -> LongContext:
        """How a sequence of that many tokens, prompt and answer, is read."""
        window = trained_window(self.config)
        factor = 1
        while factor * window < length:
            factor *= 2
        if self.name == "plain" or factor == 1:
            return LongContext()
        if self.name == "yarn":
            yarn = self.config.yarn or Yarn(1.0, window)
            return LongContext(yarn.stretched(float(factor)))
        chunks = self.config.dual_chunk or DualChunk(window, window // 32, window)
        return LongContext(None, chunks, factor * window)


@dataclass(frozen=True)
class LengthPlan:
    """Which lengths generated questions have, and how they are read.

    wanted: the user's lengths; empty: the benchmarks' own, up to `stated` tokens.
    readings: None means as the engine decides. max_context: the engine's, where a length is beyond
    what the checkpoint states.
    """

    wanted: Sequence[int] = ()
    stated: int | None = None
    readings: Sequence[Reading | None] = (None,)
    max_context: int | None = None

    def lengths(self, benchmark: Benchmark) -> list[int]:
        """The lengths of a benchmark's questions; those beyond the context are left out, told."""
        form = benchmark.long
        assert form is not None
        most = self.max_context or self.stated
        if self.wanted or most is None:
            return list(self.wanted or form.lengths)
        kept = [length for length in form.lengths if length <= most] or [most]
        if len(kept) < len(form.lengths):
            what = f"lengths beyond {most:,} tokens are left out"
            notice(f"{what}; --lengths or --long-context asks them", benchmark.name)
        return kept


def plan_lengths(
    benchmarks: Sequence[Benchmark], model: str | None, lengths: str, readings: str
) -> LengthPlan:
    """The plan for benchmarks.

    Args:
        model: the checkpoint; None where a server answers, whose context is not known here.
        lengths: the user's, such as "4k,32k", or "".
        readings: some of `READINGS` with commas between them, or "".

    Raises:
        OpenQwenError: a length or a reading is unknown, or a server is asked for readings.
    """
    wanted = [context_tokens(part.strip()) for part in lengths.split(",") if part.strip()]
    names = [part.strip() for part in readings.split(",") if part.strip()]
    if unknown := [name for name in names if name not in READINGS]:
        near = suggestion(unknown[0], READINGS)
        what = f"There is no way '{unknown[0]}' to read long prompts.{near}"
        raise OpenQwenError(what, "--long-context", f"use some of: {', '.join(READINGS)}")
    if model is None and names:
        what = "A server decides by itself how it reads long prompts."
        raise OpenQwenError(what, "--long-context", "leave it out, or give no --generator")
    forms = [benchmark.long for benchmark in benchmarks if benchmark.long]
    if not forms or model is None:
        return LengthPlan(wanted)
    config = load_model(model, device="meta").config
    stated = stated_context(config)
    longest = max(wanted or (max(form.lengths) for form in forms))
    beyond = longest if longest > stated and (wanted or names) else None
    chosen = [Reading(name, config) for name in names]
    return LengthPlan(wanted, stated, chosen or [None], beyond)


def generate_items(
    benchmark: Benchmark,
    folder: Path | None,
    encode: Encode,
    seed: int = 0,
    lengths: Sequence[int] = (),
    limit: int | None = None,
) -> tuple[list[BenchmarkItem], dict[str, str]]:
    """The questions of a benchmark with [generate] or [positions], and its files' checksums.

    Args:
        folder: where the books are.
        encode: the tokens of a prompt (a text, or messages) of the model.
        seed: of every draw.
        lengths: in place of the benchmark's.
        limit: most questions, drawn at random; None: all.

    Raises:
        OpenQwenError: books are missing, or fit no question.
    """
    form = benchmark.long
    assert form is not None
    lengths = list(lengths or form.lengths)
    library = _Library(benchmark, folder, max(lengths))
    maker = _Maker(benchmark, library, encode, seed)
    items: list[BenchmarkItem] = []
    tasks = benchmark.generate.tasks if benchmark.generate else [None]
    with progress(f"{benchmark.name}, made", len(tasks) * len(lengths), "contexts") as bar:
        for task in tasks:
            for length in lengths:
                for sample in range(form.samples):
                    if task is None:
                        items.append(_text(benchmark, library, encode, length, sample))
                    else:
                        items += maker.questions(task, length, sample)
                bar.advance()
    if not items:
        what = f"No question of '{benchmark.name}' fits into {max(lengths):,} tokens."
        raise OpenQwenError(what, do="give longer --lengths")
    if limit is not None and limit < len(items):
        drawn = Generators(seed)[f"limit/{benchmark.name}"].permutation(len(items))[:limit]
        items = [items[i] for i in sorted(drawn)]
    return items, checksums(benchmark, library.files)


class _Library:
    """The books of a benchmark, by the patterns of their files; each is read once."""

    def __init__(self, benchmark: Benchmark, folder: Path | None, longest: int):
        self.benchmark, self.folder = benchmark, folder
        self._most = max(_LEAST_BOOKS, _CHARACTERS * longest)
        self._books: dict[tuple[str, ...], Books] = {}
        self.files: list[Path] = []

    def paths(self, patterns: Sequence[str]) -> list[Path]:
        """The files of the first pattern that fits; none where they are not at hand."""
        found = matching(patterns, self.folder)
        self.files += [path for path in found if path not in self.files]
        return found

    def books(self, patterns: Sequence[str]) -> Books:
        """The sentences of these files."""
        key = tuple(patterns)
        if key not in self._books:
            found = self.paths(patterns)
            if not found:
                raise missing_data(self.benchmark, patterns, self.folder)
            self._books[key] = Books.of(_texts(found), self._most)
        return self._books[key]


def _texts(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        if path.suffix in (".txt", ".md"):
            yield path.read_text(encoding="utf-8", errors="replace")
            continue
        for where, record in read_records(path):
            if not isinstance(record.get("text"), str):
                raise OpenQwenError("This record has no 'text'.", where, "give books as documents")
            yield record["text"]


class _Maker:
    """Makes the questions of a benchmark."""

    def __init__(self, benchmark: Benchmark, library: _Library, encode: Encode, seed: int):
        self.benchmark, self.library, self.encode, self.seed = benchmark, library, encode, seed
        self.answer_tokens = benchmark.answer.max_tokens if benchmark.answer else 0
        self._told: set[tuple[str, int]] = set()
        self._questions: dict[str, tuple[list[Values], list[str]] | None] = {}

    def questions(self, task: LongTask, length: int, sample: int) -> Iterator[BenchmarkItem]:
        """One question for each depth; none where it does not fit, which is told."""
        depths: Sequence[float | None] = task.depths or [None]
        for depth in depths:
            place = sample if depth is None else f"{depth:g}/{sample}"
            name = f"{task.name}/{length}/{place}"
            rng = Generators(self.seed)[f"long/{self.benchmark.name}/{name}"]
            hay = rng
            if depth is not None:
                # One text for all depths and lengths: they compare, and the engine computes what
                # stands before the needle once.
                hay = Generators(self.seed)[f"hay/{self.benchmark.name}/{task.name}/{sample}"]
            context = self.context(task, length - self.answer_tokens, rng, hay, depth)
            if context is None:
                continue
            before = self.example(task, length - self.answer_tokens, rng) if task.example else ""
            item = self.item(task, context, length, name, depth, before)
            if item is not None:
                yield item
            elif (task.name, length) not in self._told:
                self._told.add((task.name, length))
                where = f"task {task.name}, {length:,} tokens"
                notice("the shortest question is longer than this; it is left out", where)

    def item(
        self,
        task: LongTask,
        context: Filling,
        length: int,
        name: str,
        depth: float | None,
        before: str,
    ) -> BenchmarkItem | None:
        """The question with as much context as fits, or None."""

        def prompt(n: int) -> Any:
            values = context.values(n)
            text, begun = self.rendered(task, values)
            if self.benchmark.prompt.form == "base":
                return before + text + begun
            messages = [{"role": "user", "content": before + text}]
            return (
                [*messages, {"role": "assistant", "content": begun.strip()}] if begun else messages
            )

        n = fitting(context, lambda n: len(self.encode(prompt(n))), length - self.answer_tokens)
        if n is None:
            return None
        asked, row = prompt(n), task.name if depth is None else f"{depth:g} %"
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
        reference = {"answers": context.values(n)["answers"], "match": task.match}
        graded = Task(name, messages, "contains", reference, {"kind": task.name})
        return BenchmarkItem(name, task.name, asked, graded, cell=(row, length))

    def rendered(self, task: LongTask, values: Values) -> tuple[str, str]:
        """The question and the beginning of its answer."""
        values = {**values, "kind": task.values if isinstance(task.values, str) else "words"}
        known = {"record": values} | values
        where = f"{self.benchmark.name}, task {task.name}"
        texts = [
            str(evaluated(template(source), known, f"generate.tasks.{key}", where))
            for key, source in (("question", task.question), ("answer", task.answer))
        ]
        return texts[0], texts[1]

    def example(self, task: LongTask, room: int, rng: Any) -> str:
        """A short solved example of the task, with what goes between it and the question."""
        draws = Draws(rng, self.words(task))
        short = room < 4_096 - 128
        context: Filling = variables(draws, letters=3)
        units, marked = 5, False
        if task.kind == "common_words":
            context, units, marked = common_words(draws, room, True), 20 if short else 40, True
        values = context.values(units)
        answers = values["answers"]
        listed = " ".join(f"{n}. {word}" if marked else word for n, word in enumerate(answers, 1))
        text, begun = self.rendered(task, values)
        return f"{text}{begun.rstrip()} {listed}\n\n"

    def words(self, task: LongTask) -> list[str]:
        """The words of the task's books."""
        return self.library.books(task.books or self.benchmark.data.test).words

    def context(
        self, task: LongTask, room: int, rng: Any, hay: Any, depth: float | None
    ) -> Filling | None:
        """The context of one question; None where its documents are not at hand, which is told."""
        if task.kind == "documents":
            return self.documents(task, rng)
        if task.kind == "variables":
            return variables(Draws(rng))
        if task.kind == "frequent_words":
            return frequent_words(Draws(rng), room)
        if task.kind == "common_words":
            return common_words(Draws(rng, self.words(task)), room, False)
        return self.needles(task, room, rng, hay, depth)

    def needles(
        self, task: LongTask, room: int, rng: Any, hay: Any, depth: float | None
    ) -> Needles:
        """A haystack with the task's needles."""
        words = self.words(task) if "words" in (task.keys, task.values) else []
        draws = Draws(rng, words)
        keys = draws.distinct(task.keys, max(task.key_count, task.query_count))
        values = draws.distinct(task.values, len(keys) * task.value_count)
        pairs = [(key, values.pop()) for key in keys for _ in range(task.value_count)]
        pairs = [pairs[i] for i in rng.permutation(len(pairs))]
        queried = [keys[i] for i in rng.permutation(len(keys))[: task.query_count]]
        places = rng.permutation(_MOST_DEPTHS)[: len(pairs)] / (_MOST_DEPTHS - 1)
        depths = places.tolist() if depth is None else [depth / 100] * len(pairs)

        def needle(key: str, value: str) -> str:
            known = {"key": key, "value": value}
            where = f"{self.benchmark.name}, task {task.name}"
            render = template(task.needle)
            return str(evaluated(render, known | {"record": known}, "generate.tasks.needle", where))

        if task.haystack == "books":
            sentences = self.library.books(task.books or self.benchmark.data.test).sentences
            joint = "" if task.language == "zh" else " "
            start = int(hay.integers(len(sentences)))
            return Needles(sentences, needle, pairs, queried, depths, joint, start)
        noise: Sequence[str] = [NOISE] * room
        if task.haystack == "needles":
            noise = _LazyNeedles(needle, Draws(rng, words), task, room)
        return Needles(noise, needle, pairs, queried, depths, "\n")

    def documents(self, task: LongTask, rng: Any) -> Documents | None:
        """A question with documents of SQuAD or HotpotQA."""
        if task.name not in self._questions:
            found = self.library.paths(task.books)
            self._questions[task.name] = read_documents(found[0]) if found else None
            if not found:
                where = " or ".join(task.books)
                notice(f"task {task.name} is left out: its data is not at hand", where)
        known = self._questions[task.name]
        if known is None:
            return None
        questions, documents = known
        chosen = questions[int(rng.integers(len(questions)))]
        own = chosen["own"]
        others = [i for i in rng.permutation(len(documents)).tolist() if i not in set(own)]
        near = [i for i in chosen["near"] if i not in set(own)]
        order = list(dict.fromkeys([*own, *near, *others]))
        texts = [documents[i] for i in order]
        seed = int(rng.integers(2**31))
        return Documents(chosen["question"], chosen["answers"], texts, seed, least=len(own))


class _LazyNeedles(Sequence[str]):
    """A haystack of other needles, drawn when they are read."""

    def __init__(self, needle: Callable[[str, str], str], draws: Draws, task: LongTask, n: int):
        self._needle, self._draws, self._task, self._n = needle, draws, task, n
        self._drawn: list[str] = []

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: Any) -> Any:
        while len(self._drawn) <= index:
            (key,), (value,) = (
                self._draws.distinct(kind, 1) for kind in (self._task.keys, self._task.values)
            )
            self._drawn.append(self._needle(key, value))
        return self._drawn[index]


def read_documents(path: Path) -> tuple[list[Values], list[str]]:
    """Questions with their documents, of SQuAD 2 or of HotpotQA in their published form.

    Returns:
        Questions, each with question, answers, own (indices of the documents that answer it) and
        near (those of the same article), and all documents in order of the alphabet.
    """
    try:
        with open_binary(path) as file:
            root = parse_json(file.read())
        if isinstance(root, list):
            return _hotpot(root)
        return _squad(root["data"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        do = "give dev-v2.0.json of SQuAD or hotpot_dev_distractor_v1.json"
        raise OpenQwenError(f"This is not a file of questions: {error}.", path, do) from None


def _squad(articles: list[Any]) -> tuple[list[Values], list[str]]:
    paragraphs = [part for article in articles for part in article["paragraphs"]]
    documents = sorted({part["context"] for part in paragraphs})
    place = {text: index for index, text in enumerate(documents)}
    questions = []
    for article in articles:
        near = [place[part["context"]] for part in article["paragraphs"]]
        for part in article["paragraphs"]:
            for asked in part["qas"]:
                answers = list(dict.fromkeys(one["text"] for one in asked["answers"]))
                if answers and not asked.get("is_impossible"):
                    own = [place[part["context"]]]
                    one = {"question": asked["question"], "answers": answers}
                    questions.append(one | {"own": own, "near": near})
    return questions, documents


def _hotpot(records: list[Any]) -> tuple[list[Values], list[str]]:
    def text(title: str, sentences: list[str]) -> str:
        return f"{title}\n{''.join(sentences)}"

    documents = sorted({text(*part) for record in records for part in record["context"]})
    place = {document: index for index, document in enumerate(documents)}
    questions = []
    for record in records:
        own = [place[text(*part)] for part in record["context"]]
        one = {"question": record["question"], "answers": [record["answer"]]}
        questions.append(one | {"own": own, "near": list[int]()})
    return questions, documents


def _text(
    benchmark: Benchmark, library: _Library, encode: Encode, length: int, sample: int
) -> BenchmarkItem:
    """A stretch of the books that fills `length` tokens, the same in every run.

    Two are left for the token before the text and one after it.
    """
    sentences = library.books(benchmark.data.test).sentences
    start = sample * len(sentences) // 7 % len(sentences)
    ids: list[int] = []
    text: list[str] = []
    while len(ids) < length:
        size = max(64, (length - len(ids)) // 8)
        part = " ".join(sentences[start : start + size])
        if not part:
            start = 0
            continue
        start += size
        text.append(part)
        ids += encode(f" {part}" if ids else part)
    name = f"{length}/{sample}"
    prompt = " ".join(text)
    return BenchmarkItem(name, f"{length:,} tokens", prompt, ids=ids[: length - 2])
