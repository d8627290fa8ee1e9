"""`openqwen evaluate MODEL --tasks …`: published benchmarks, and the comparison of two results."""

import hashlib
from collections import Counter
from dataclasses import replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from openqwen.engine import Endpoint, EngineConfig, Generator
from openqwen.engine.workers import EngineSource, EngineWorkers
from openqwen.evaluate.ask import ReplyCache, Subject
from openqwen.evaluate.benchmark import REPORTS, Benchmark, load_benchmark, names, select
from openqwen.evaluate.benchmark_run import BenchmarkOptions, run_benchmark
from openqwen.evaluate.compare import RESULTS, Evaluation, guess_published, read_evaluation
from openqwen.evaluate.contamination import Found, find_contaminated, mark_contaminated
from openqwen.evaluate.items import at_hand, load_items
from openqwen.evaluate.judges import load_judge
from openqwen.evaluate.long_context import generate_items, plan_lengths
from openqwen.evaluate.report import write_reports
from openqwen.support.command import command
from openqwen.support.device import best_device
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import sha256
from openqwen.support.hub import HUB, local
from openqwen.support.page.text import percent, signed
from openqwen.support.progress import console, duration, notice
from openqwen.support.settings import Quantization
from openqwen.support.workers import WorkersConfig, WorkKind
from openqwen.tasks import GradeCache
from openqwen.tokenizer import load_tokenizer

ABOUT = (
    "Score a model on benchmarks; answers that are known are not asked again. `evaluate compare A "
    "B` compares the results in two folders. With --corpus the scores are those of a recipe's "
    "stage:"
)
_WIDTH = 130  # characters: the table is printed whole, in narrower terminals too
_ALONE = WorkersConfig()
_HASHED = 2**30  # bytes; of larger files size and time of change are taken in place of the content


def evaluate(
    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = None,
    tasks: str = "",
    data: Path | None = None,
    list_: Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(name="list")] = False,
    limit: int | None = None,
    samples: int = 1,
    temperature: float = 0.0,
    max_tokens: int | None = None,
    seed: int = 0,
    lengths: str = "",
    long_context: str = "",
    quantize: Quantization | None = None,
    generator: str | None = None,
    served_name: str | None = None,
    judge: str | None = None,
    judge_name: str | None = None,
    contamination: Path | None = None,
    published: str | None = None,
    output: Path | None = None,
    cache: Path | None = None,
    engine: WorkKind = "single",
    workers: WorkersConfig = _ALONE,
) -> None:
    """Score a model on benchmarks; answers that are known are not asked again.

    Args:
        model: A Hugging Face folder, a .gguf file or a hub id; with --generator its tokenizer.
        tasks: Benchmarks, suites or TOML files, with commas between them, or all.
        data: The folder with the benchmarks' files; default: the hub, for those that name a place.
        list_: Show the benchmarks, their protocols and licences, and which data is at hand.
        limit: Ask this many questions of each benchmark, drawn at random.
        samples: Answers to each question, for pass@k.
        temperature: What they are sampled at; 0 takes the likeliest token.
        max_tokens: Most tokens of an answer, in place of the benchmark's own number.
        seed: Seed of every random draw.
        lengths: Lengths in tokens of generated questions, such as 4k,32k; default: the benchmark's,
            as far as the model's context goes.
        long_context: Ways to read generated questions beyond the trained window, side by side:
            plain, yarn, dca, with commas between them; default: the engine's own choice.
        quantize: Store the weights in 8 or 4 bits.
        generator: The URL of an OpenAI-compatible server that answers in place of MODEL.
        served_name: The model's name at that server; default: MODEL.
        judge: The model that grades open answers: a folder, a .gguf file, a hub id, the URL of an
            OpenAI-compatible server, or a reward model.
        judge_name: The judge's name at its server.
        contamination: A folder of training data: scores on the questions that it does not hold are
            shown beside the whole.
        published: Suite and size to compare with, such as qwen2.5-instruct:0.5B; default: as the
            model's name says.
        output: The folder of the results; default: evaluations/MODEL.
        cache: The folder of known answers; default: `cache` beside the output.
        engine: Where MODEL runs: in this process, in several, or on a Ray cluster.
        workers: The processes of --engine processes and ray.
    """
    if list_:
        _list([load_benchmark(name) for name in names()] if not tasks else select(tasks), data)
        return
    if not model:
        do = f"{command('evaluate', 'MODEL', '--tasks', 'humaneval', '--data', 'FOLDER')}"
        raise OpenQwenError("No model is named.", do=do)
    options = BenchmarkOptions(seed, samples, temperature, max_tokens)
    chosen = _at_hand(tasks, data, judge is not None)
    published_items = {b.name: load_items(b, data, seed, limit) for b in chosen if not b.long}
    output = output or Path("evaluations") / "-".join(filter(None, [Path(model).name, quantize]))
    cache = cache or output.parent / "cache"
    plan = plan_lengths(chosen, None if generator else model, lengths, long_context)
    subject = _subject(
        model, quantize, generator, served_name, cache, engine, workers, plan.max_context
    )
    if judge is not None:
        subject = replace(subject, judges=load_judge(judge, judge_name, cache, _digest))
    loaded = []
    for benchmark in chosen:
        if benchmark.long:
            subject.check(benchmark.name, "", choices=True)
            wanted = plan.lengths(benchmark)
            items, sums = generate_items(benchmark, data, subject.tokens, seed, wanted, limit)
        else:
            items, sums = published_items[benchmark.name]
            # What cannot be asked must not stop the run later.
            subject.check(benchmark.name, items[0].prompt, bool(benchmark.choices))
        loaded.append((benchmark, items, sums))
    held: Found = {}
    if contamination is not None:
        held = find_contaminated({b.name: items for b, items, _ in loaded}, contamination, cache)
    evaluation = _open(output, model, subject, published, quantize)
    shown = []
    try:
        for benchmark, items, sums in loaded:
            for reading in plan.readings if benchmark.long else [None]:
                scores, rows = run_benchmark(
                    benchmark, items, subject, replace(options, reading=reading)
                )
                if benchmark.name in held:
                    mark_contaminated(scores, rows, held[benchmark.name])
                name = f"{benchmark.name}@{reading.name}" if reading else benchmark.name
                evaluation.add(name, scores | {"data": sums, "limit": limit}, rows)
                shown.append(name)
    except KeyboardInterrupt:
        console.print("Interrupted. The same command goes on with the answers that are known.")
        raise
    finally:
        subject.close()
    page = write_reports(output, [evaluation])
    table = _table(evaluation, shown)
    Console(width=max(console.width, _WIDTH)).print(table)
    for name in shown:
        _tell_not_graded(evaluation, name)
    console.print(f"report   {page}", markup=False)


def _open(
    output: Path, model: str, subject: Subject, published: str | None, quantize: str | None
) -> Evaluation:
    """The results in the folder; those of another model are left out, and told."""
    suite, _, size = (published or "").partition(":")
    results: dict[str, Any] = {
        "model": model,
        "identity": subject.identity,
        "published": (suite, size) if published else guess_published(model),
        "created": f"{datetime.now():%Y-%m-%d %H:%M}",
        "settings": {"quantize": quantize},
        "scores": {},
    }
    if (output / RESULTS).is_file():
        earlier = read_evaluation(output).results
        if earlier["identity"] == subject.identity:
            results["scores"] = earlier["scores"]
        else:
            notice("the results of another model in this folder are replaced", output)
    return Evaluation(output, results)


def compare(
    folders: Annotated[list[Path], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")],
    output: Path = Path("evaluations/comparison"),
) -> None:
    """Compare the results of models on the same questions, each with the first.

    Args:
        folders: The output folders of two or more evaluations.
        output: The folder of the page, the Markdown and the JSON.
    """
    if len(folders) < 2:
        do = f"name two folders: {command('evaluate', 'compare', 'A', 'B')}"
        raise OpenQwenError("A comparison needs two results.", do=do)
    page = write_reports(output, [read_evaluation(folder) for folder in folders])
    console.print((output / "report.md").read_text(encoding="utf-8"), markup=False)
    console.print(f"report   {page}", markup=False)


def _at_hand(tasks: str, data: Path | None, judged: bool) -> list[Benchmark]:
    """The chosen benchmarks; those of a suite that cannot be asked here are left out, and named."""
    if data is not None and not data.is_dir():
        raise OpenQwenError("There is no such folder.", data, "give the folder of the data")
    chosen = select(tasks)
    named = {Path(name.strip()).stem for name in tasks.split(",")}
    kept: list[Benchmark] = []
    absent: list[Benchmark] = []
    unjudged: list[Benchmark] = []
    for benchmark in chosen:
        if benchmark.judged and not judged:
            unjudged.append(benchmark)
        elif benchmark.name in named or at_hand(benchmark, data):
            kept.append(benchmark)
        else:
            absent.append(benchmark)
    if wanted := [benchmark.name for benchmark in unjudged if benchmark.name in named]:
        what = f"A judge grades the answers of {', '.join(wanted)}."
        raise OpenQwenError(what, "--judge", "give a model, a reward model or a server's URL")
    if unjudged:
        console.print(f"Left out without --judge: {', '.join(b.name for b in unjudged)}.")
    if absent:
        console.print(
            f"Left out, as their data is not at hand: {', '.join(b.name for b in absent)}. "
            f"{command('evaluate', '--list')} says where to get it."
        )
    if not kept:
        do = f"give --data; {command('evaluate', '--list')} says where to get the files"
        raise OpenQwenError("None of these benchmarks has its data at hand.", data, do)
    return kept


def _subject(
    model: str,
    quantize: Any,
    url: str | None,
    served_name: str | None,
    cache: Path,
    engine: WorkKind,
    workers: WorkersConfig,
    max_context: int | None = None,
) -> Subject:
    if url is not None and engine != "single":
        what = "Workers need a model that they can load, not a server."
        raise OpenQwenError(what, f"--engine {engine}", "leave out --engine or --generator")
    if url is not None:
        name = served_name or model
        tokenizer = load_tokenizer(model) if Path(model).exists() else None
        identity = f"{url} {name}"
        endpoint = Endpoint(url, name, cache=cache / "responses")
        return Subject(lambda: endpoint, tokenizer, identity, *_caches(cache, identity))
    path, device = local(model), best_device()
    tokenizer = load_tokenizer(path)
    # The version: another one may compute other last digits.
    identity = f"{_digest(path)} {quantize} {device.type} {version('openqwen')}"
    # A longer context may change how prompts are read, so its answers are kept apart; the scores
    # stand beside the others.
    kept = f"{identity} {max_context}" if max_context else identity

    def load() -> Generator:
        source = EngineSource(path, quantize, EngineConfig(max_context=max_context))
        return source.load() if engine == "single" else EngineWorkers(source, engine, workers)

    return Subject(load, tokenizer, identity, *_caches(cache, kept))


def _caches(folder: Path, identity: str) -> tuple[ReplyCache, GradeCache]:
    """What the model answered before, and how answers of any model were graded."""
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return ReplyCache(folder / f"{digest}.jsonl"), GradeCache(folder / "grades.jsonl")


def _digest(path: Path) -> str:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    total = hashlib.sha256()
    for file in files:
        status = file.stat()
        large = status.st_size > _HASHED
        content = f"{status.st_size} {status.st_mtime_ns}" if large else sha256(file)
        total.update(f"{file.relative_to(path)} {content}\n".encode())
    return total.hexdigest()


def _list(benchmarks: list[Benchmark], data: Path | None) -> None:
    """Print each benchmark as a block: a table of long texts cannot be read in 80 columns."""
    ready = 0
    for benchmark in benchmarks:
        here = at_hand(benchmark, data)
        ready += here
        hub = any(pattern.startswith(HUB) for pattern in benchmark.data.test)
        protocol = f"{benchmark.protocol} ({benchmark.protocol_source})"
        lines = {"protocol": protocol, "source": benchmark.source, "licence": benchmark.licence}
        lines["data"] = "at hand" if here else f"{'hub, or ' if hub else ''}{benchmark.get}"
        if benchmark.published:
            lines["suites"] = ", ".join(sorted(benchmark.published))
        table = Table(box=None, show_header=False, pad_edge=False)
        for name, text in lines.items():
            table.add_row(f"  {name}", escape(text))
        console.print(f"[bold]{benchmark.name}[/bold]  {escape(benchmark.title)}", highlight=False)
        console.print(table)
    suites = sorted({suite for benchmark in benchmarks for suite in benchmark.published})
    where = f" in {data}" if data else "; --data FOLDER says where your files are"
    console.print(f"{len(benchmarks)} benchmarks, {ready} at hand{where}", markup=False)
    console.print(f"suites: {', '.join([*suites, 'all'])}", markup=False)
    console.print(f"published scores: {'; '.join(REPORTS.values())}", markup=False)


def _tell_not_graded(evaluation: Evaluation, name: str) -> None:
    """Say why answers could not be graded, such as by a judge that ignores its format."""
    if not evaluation.scores[name]["infra"]:
        return
    reasons = Counter(row["reason"] for row in evaluation.rows(name) if row["status"] == "infra")
    reason, count = reasons.most_common(1)[0]
    total = sum(reasons.values())
    what = f"{total} answers could not be graded and are left out of the score"
    notice(f"{what}; {count} of them: {reason}", name)


def _table(evaluation: Evaluation, chosen: list[str]) -> Table:
    table = Table(box=box.SIMPLE, header_style="dim", pad_edge=False)
    suite = " ".join(evaluation.results["published"] or ["no suite"])
    columns = ("benchmark", "n", "score", "± error", f"published ({suite})", "difference")
    for column in (*columns, "no result", "cut off", "infra", "time"):
        table.add_column(column, justify="left" if column == "benchmark" else "right")
    for name in chosen:
        scores, known = evaluation.scores[name], evaluation.published(name)
        score = scores["score"]
        error = scores.get("standard_error")
        gap = "" if known is None or score is None else signed(100 * score - known, 1)
        table.add_row(
            name,
            f"{scores['n']:,}",
            percent(score),
            "–" if error is None else f"{100 * error:.1f}",
            "–" if known is None else f"{known:.1f}",
            gap,
            *(f"{scores[key]:,}" for key in ("no_answer", "cut_off", "infra")),
            duration(scores["seconds"]),
        )
    return table
