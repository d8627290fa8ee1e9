"""From a benchmark's files to items: prompts with what their answers are graded by."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from openqwen.evaluate.benchmark import Benchmark, evaluated, expression, template
from openqwen.sandbox.languages import available
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import open_binary, parse_json, refuse_pointer, sha256
from openqwen.support.generators import Generators
from openqwen.support.hub import HUB
from openqwen.support.progress import notice
from openqwen.support.records import data_files, read_records
from openqwen.tasks import Task
from openqwen.tasks.graders import check_task
from openqwen.tasks.readers import read_problem

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
Values = dict[str, Any]


@dataclass(frozen=True)
class BenchmarkItem:
    """One question of a benchmark.

    Args:
        id: unique in the benchmark.
        category: the group in which it is counted.
        prompt: a text to continue, or messages, of which the last may be the beginning of the
            assistant's answer.
        task: what a generated answer is graded by; None for choices.
        options: the continuations whose likelihoods are compared, after the prompt and, if there
            are any, the option's own of `contexts`.
        correct: of each option, whether it is right.
        turns: the user's messages after the first answer, each with what its answer is graded by;
            the prompt of such a task is that message alone.
        temperature: what answers are sampled at, in place of the run's.
        stops: texts that end an answer, beside the benchmark's.
        cell: row and column in a heat map; the column is the length in tokens that the prompt and
            the answer were made for.
        ids: the tokens of a text that is scored as a whole.
        texts: the texts of the published record, by which it is looked for in training data.
    """

    id: str
    category: str
    prompt: str | list[dict[str, Any]]
    task: Task | None = None
    options: Sequence[str] = ()
    contexts: Sequence[str] = ()
    correct: Sequence[float] = field(default=())
    turns: Sequence[Task] = ()
    temperature: float | None = None
    stops: tuple[str, ...] = ()
    cell: tuple[str, int] | None = None
    ids: Sequence[int] = ()
    texts: Sequence[str] = ()


def find_files(benchmark: Benchmark, folder: Path | None, part: str = "test") -> list[Path]:
    """The files of a part of the data; none where it is not at hand."""
    return matching(getattr(benchmark.data, part), folder)


def at_hand(benchmark: Benchmark, folder: Path | None) -> bool:
    """Whether all files that a benchmark needs are in the folder."""
    parts = [benchmark.data.test, *(table.files for table in benchmark.data.tables.values())]
    parts += [benchmark.data.shots] if benchmark.prompt.shots else []
    return all(matching(patterns, folder) for patterns in parts)


def matching(patterns: Sequence[str], folder: Path | None) -> list[Path]:
    """The files of the first pattern that fits; none where there are none."""
    for pattern in patterns:
        if pattern.startswith(HUB):
            continue
        found: dict[str, Path] = {}  # without two forms of one file, such as .jsonl and .jsonl.gz
        for path in sorted(folder.glob(pattern)) if folder else []:
            found.setdefault(str(path).removesuffix(".gz").removesuffix(".zst"), path)
        if found:
            return list(found.values())
    return []


def _files(benchmark: Benchmark, folder: Path | None, part: str) -> list[Path]:
    if files := find_files(benchmark, folder, part):
        return files
    patterns: list[str] = getattr(benchmark.data, part)
    if folder is None and (hub := [p for p in patterns if p.startswith(HUB)]):
        return data_files(hub[0])
    raise missing_data(benchmark, patterns, folder)


def missing_data(
    benchmark: Benchmark, patterns: Sequence[str], folder: Path | None
) -> OpenQwenError:
    """The error that says where to get a benchmark's files."""
    wanted = " or ".join(pattern for pattern in patterns if not pattern.startswith(HUB))
    what = f"The data of '{benchmark.name}' is not at hand: {wanted} is missing."
    do = f"get it from {benchmark.source}: {benchmark.get}"
    return OpenQwenError(what, folder or "--data", do)


def load_items(
    benchmark: Benchmark, folder: Path | None, seed: int = 0, limit: int | None = None
) -> tuple[list[BenchmarkItem], dict[str, str]]:
    """The items of a benchmark, and the checksums of the files that they are from.

    Args:
        folder: where the files are; None: the hub, if the benchmark names a place there.
        seed: of the order of shuffled options, and of the choice of `limit` items.
        limit: take this many items, drawn at random; None: all.

    Raises:
        OpenQwenError: a file is missing (says where to get it) or has another form.
    """
    if limit is not None and limit < 1:
        raise OpenQwenError(f"{limit} questions tell nothing.", "--limit", "give 1 or more")
    files = _files(benchmark, folder, "test")
    solved = _files(benchmark, folder, "shots") if benchmark.prompt.shots else []
    tables, beside = _tables(benchmark, folder)
    groups: dict[str, list[Values]] = {}
    for where, values in _records(benchmark, solved, folder, seed, tables, "shots"):
        groups.setdefault(values["category"], []).append(values | {"where": where})
    everything = [values for group in groups.values() for values in group]
    records = list(_records(benchmark, files, folder, seed, tables))
    if limit is not None and limit < len(records):
        drawn = Generators(seed)[f"limit/{benchmark.name}"].permutation(len(records))[:limit]
        records = [records[i] for i in sorted(drawn)]
    items: dict[str, BenchmarkItem] = {}
    for where, values in records:
        known = groups.get(values["category"], everything)
        # By the record: two files may count their ids alike, and one file may give both parts.
        others = (shot for shot in known if shot["record"] != values["record"])
        item = _item(benchmark, values, list(islice(others, benchmark.prompt.shots)), where)
        if item.id in items:
            what = f"Two records have the id '{item.id}'."
            raise OpenQwenError(what, where, "correct 'id' of the benchmark, or the data")
        items[item.id] = item
    if not items:
        raise OpenQwenError(
            "There are no records here.", files[0], "check the data and 'data.keep'"
        )
    items = _runnable(benchmark, items)
    return list(items.values()), checksums(benchmark, [*files, *solved, *beside])


def _runnable(benchmark: Benchmark, items: dict[str, BenchmarkItem]) -> dict[str, BenchmarkItem]:
    """The items whose programs can run here. Languages that are left out are told."""
    wanted = {
        name: item.task.reference.get("language", "python")
        for name, item in items.items()
        if item.task and item.task.grader == "code"
    }
    libraries = benchmark.answer.libraries if benchmark.answer else {}
    lacking = {name: file for name, file in libraries.items() if not Path(file).exists()}
    absent = set(wanted.values()) - (set(available()) - set(lacking)) if wanted else set()
    for language in sorted(absent):
        count = sum(one == language for one in wanted.values())
        what = f"{language} lacks {lacking[language]}" if language in lacking else ""
        what = what or f"{language} is not installed"
        notice(f"{what}: {count} questions are left out", benchmark.name)
    kept = {name: item for name, item in items.items() if wanted.get(name) not in absent}
    if not kept:
        what = f"None of the languages of '{benchmark.name}' is installed."
        raise OpenQwenError(what, do=f"install one of: {', '.join(sorted(absent))}")
    return kept


def _tables(benchmark: Benchmark, folder: Path | None) -> tuple[Values, list[Path]]:
    """The records of each of `data.tables` by key, and the files that they are from."""
    tables: Values = {}
    files: list[Path] = []
    for name, table in benchmark.data.tables.items():
        found = matching(table.files, folder)
        if not found:
            raise missing_data(benchmark, table.files, folder)
        files += found
        tables[name] = {}
        for path in found:
            for where, record in _read(benchmark, path):
                values = {**record, "record": record}
                key = _value(table.key, values, f"data.tables.{name}.key", where)
                tables[name][key] = record
    return tables, files


def checksums(benchmark: Benchmark, files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of files by their names; a file that the benchmark does not know is told."""
    sums = {}
    for path in files:
        sums[path.name] = digest = sha256(path)
        known = benchmark.data.sha256.get(path.name)
        if known and digest != known:
            notice(f"this file differs from the one that '{benchmark.name}' was written for", path)
    return sums


def _records(
    benchmark: Benchmark,
    files: Sequence[Path],
    folder: Path | None,
    seed: int,
    tables: Values,
    part: str = "test",
) -> Iterator[tuple[str, Values]]:
    """Each record that is kept, with its place, as the variables of templates."""
    for path in files:
        for number, (where, record) in enumerate(_read(benchmark, path), 1):
            if not isinstance(record, Mapping):
                what = "This record is not an object."
                raise OpenQwenError(what, where, "correct 'data.records' of the benchmark")
            fields = {key: value for key, value in record.items() if str(key).isidentifier()}
            file = path.name.split(".")[0]
            values: Values = tables | fields | {"record": record, "file": file, "number": number}
            values |= {
                "filename": path.name,
                "folder": path.parent.name,
                "letters": _LETTERS,
                "part": part,
                "turn": 1,
            }
            values["category"] = str(record.get("category") or "")
            if not _value(benchmark.data.keep or "true", values, "data.keep", where):
                continue
            for each in _value(benchmark.data.each or "[none]", values, "data.each", where):
                yield where, _described(benchmark, values | {"each": each}, folder, seed, where)


def _described(
    benchmark: Benchmark, values: Values, folder: Path | None, seed: int, where: str
) -> Values:
    """The variables with those that the benchmark computes: category, id, beside, shuffled."""
    if benchmark.category:
        values["category"] = str(_value(benchmark.category, values, "category", where))
    default = "file ~ '/' ~ number"
    values["id"] = str(_value(benchmark.id or default, values, "id", where))
    if benchmark.data.beside and folder:
        name = evaluated(template(benchmark.data.beside), values, "data.beside", where)
        values["beside"] = _text(folder, name)
    if benchmark.shuffle:
        listed = list(_value(benchmark.shuffle, values, "shuffle", where))
        draw = Generators(seed)[f"shuffle/{benchmark.name}/{values['id']}"]
        order = draw.permutation(len(listed)).tolist()
        values["shuffled"], values["place"] = [listed[i] for i in order], order.index(0)
    return values


def _value(text: str, values: Values, key: str, where: str) -> Any:
    return evaluated(expression(text), values, key, where)


def _text(folder: Path, name: str) -> str:
    path = folder / name
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        raise OpenQwenError("A file beside the data is missing.", path, "get the whole data set")
    return path.read_text(encoding="utf-8")


def _read(benchmark: Benchmark, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    plain = path.name.removesuffix(".gz").removesuffix(".zst")
    if benchmark.data.lines:
        yield from _texts(path)
    elif plain.endswith((".csv", ".tsv")):
        yield from _table(path, "\t" if plain.endswith(".tsv") else ",", benchmark.data.columns)
    elif benchmark.data.records:
        try:
            with open_binary(path) as file:
                root = parse_json(file.read())
        except (ValueError, OSError) as error:
            raise OpenQwenError(f"This file cannot be read: {error}.", path) from None
        values = {"root": root, "record": root if isinstance(root, dict) else {}}
        records = _value(benchmark.data.records, values, "data.records", str(path))
        for number, record in enumerate(records, 1):
            yield f"{path}, record {number}", record
    elif plain.endswith(".jsonl"):
        yield from _lines(path)
    else:
        yield from read_records(path)


def _texts(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """A record for each line."""
    try:
        with open_binary(path) as binary:
            for number, line in enumerate(io.TextIOWrapper(binary, encoding="utf-8-sig"), 1):
                yield f"{path}:{number}", {"text": line.strip(), "number": number}
    except (UnicodeDecodeError, OSError) as error:
        raise OpenQwenError(f"This file cannot be read: {error}.", path) from None


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """JSON Lines that may hold Infinity and NaN, as inputs of EvalPlus do."""
    number = 0
    try:
        refuse_pointer(path)
        with open_binary(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, record {number}", json.loads(line)
    except (ValueError, RecursionError, OSError) as error:
        raise OpenQwenError(f"This line cannot be read: {error}.", f"{path}:{number}") from None


def _table(path: Path, mark: str, columns: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    with open_binary(path) as binary:
        text = io.TextIOWrapper(binary, encoding="utf-8-sig", newline="")
        rows: Iterator[list[str]] = csv.reader(text)
        if mark == "\t":  # quotes have no meaning there
            rows = (line.rstrip("\r\n").split("\t") for line in text)
        try:
            names = columns or next(rows, [])
            for number, row in enumerate(rows, 1):
                where = f"{path}, record {number}"
                if len(row) != len(names):
                    what = f"This row has {len(row)} columns in place of {len(names)}."
                    raise OpenQwenError(what, where, f"the columns are: {', '.join(names)}")
                yield where, dict(zip(names, row))
        except (csv.Error, UnicodeDecodeError, OSError) as error:
            raise OpenQwenError(f"This file cannot be read: {error}.", path) from None


def _item(
    benchmark: Benchmark, values: Values, shots: Sequence[Values], where: str
) -> BenchmarkItem:
    prompt = _prompt(benchmark, values, shots, where)
    identity, category = values["id"], values["category"]
    texts = tuple(record_texts(values["record"]))
    if choices := benchmark.choices:
        options = _value(choices.options, values, "choices.options", where)
        contexts = _value(choices.contexts or "[]", values, "choices.contexts", where)
        correct = _value(choices.correct, values, "choices.correct", where)
        if not isinstance(correct, list):
            correct = [float(index == correct) for index in range(len(options))]
        if not (len(correct) == len(options) == len(contexts or options)) or not any(correct):
            what = f"There are {len(options)} options, of which {sum(correct):g} are right."
            raise OpenQwenError(what, where, "correct the table [choices]")
        return BenchmarkItem(
            identity, category, prompt, None, options, contexts, correct, texts=texts
        )
    answer = benchmark.answer
    assert answer is not None
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    task = _graded_by(benchmark, values, messages, where)
    later: list[Task] = []
    for turn, text in enumerate(_value(benchmark.prompt.turns or "[]", values, "turns", where), 2):
        message = {"role": "user", "content": str(text)}
        later.append(_graded_by(benchmark, values | {"turn": turn}, [message], where))
    sampled = None
    if answer.temperature:
        sampled = float(_value(answer.temperature, values, "answer.temperature", where))
    stops = tuple(_value(answer.stops or "[]", values, "answer.stops", where))
    return BenchmarkItem(
        identity,
        category,
        prompt,
        task,
        turns=later,
        temperature=sampled,
        stops=stops,
        texts=texts,
    )


def record_texts(value: Any) -> Iterator[str]:
    """All texts in a record, however deep; those of fewer than 13 characters are left out."""
    if isinstance(value, str):
        if len(value) >= 13:  # as many words in Chinese
            yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from record_texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from record_texts(part)


def _graded_by(
    benchmark: Benchmark, values: Values, messages: list[dict[str, Any]], where: str
) -> Task:
    """The task of one question: its messages, grader and reference."""
    answer = benchmark.answer
    assert answer is not None
    if answer.reader:
        _, _, grader, reference, _ = read_problem(answer.reader, values["record"], where)
    else:
        grader = answer.grader
        reference = {}
        for key, text in answer.reference.items():
            value = _value(text, values, f"answer.reference.{key}", where)
            if value is not None:
                reference[key] = value
    task = Task(values["id"], messages, grader, reference, {"kind": values["category"]})
    check_task(task, where)
    return task


def _prompt(
    benchmark: Benchmark, values: Values, shots: Sequence[Values], where: str
) -> str | list[dict[str, Any]]:
    """The prompt of a record after its solved examples."""
    prompt = benchmark.prompt

    def text(key: str, of: Values = values) -> str:
        source = getattr(prompt, key)
        return str(evaluated(template(source), of, f"prompt.{key}", of.get("where", where)))

    examples = [(text("question", shot), text("example", shot)) for shot in shots]
    if prompt.form == "base":
        parts = [question + answer for question, answer in examples]
        return text("head") + prompt.separator.join([*parts, text("question")])
    questions = [*(question for question, _ in examples), text("question")]
    questions[0] = text("head") + questions[0]
    messages = [{"role": "system", "content": text("system")}] if prompt.system else []
    for question, (_, answer) in zip(questions, examples):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": questions[-1]})
    if prompt.prefill:
        messages.append({"role": "assistant", "content": text("prefill")})
    return messages
