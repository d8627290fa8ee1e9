"""`openqwen VERB ...`: one command, one verb a stage.

A verb's code is loaded when that verb is used.
"""

import contextlib
import dataclasses
import importlib.metadata
import os
import runpy
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from openqwen.recipe import graph, together
from openqwen.support.command import command, pip_install
from openqwen.support.errors import OpenQwenError, suggestion

RECIPE_VERBS = {
    "run": "Run a whole recipe: raw text in, an aligned chat model out. Resumable.",
    "chat": "Talk to a model in the terminal.",
    "serve": "Serve a model over HTTP: OpenAI's API and a chat page.",
    "convert": "Turn a checkpoint into another form: folder, .gguf file, hub id; other precision.",
    "quantize": "Pack weights in 8 or 4 bits, for a CPU.",
    "report": "Write the HTML report of a run folder.",
    "preview": "Show what SFT would learn from demonstrations, token by token.",
    "bench": "Measure a claimed speed on this machine, beside a peer: train, engine or serve.",
    "plan": "Say what fits on which devices, how fast and how long, before anyone pays for it.",
    "verify": (
        "Prove on your model and data: packed, cut, resumed and generated are what they should be."
    ),
}
BENCHES = [
    "train",
    "engine",
    "serve",
]  # in recipe/bench/; engine with the peers' scripts in benchmarks/
# Verbs whose flags are the arguments of one function: where it is.
_FUNCTIONS = {
    "chat": "openqwen.serve.terminal",
    "convert": "openqwen.train.convert",
    "quantize": "openqwen.train.quantize",
    "preview": "openqwen.train.preview",
    "plan": "openqwen.recipe.plan_devices",
    "verify": "openqwen.recipe.verify",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 the user's fault, 70 ours, 130
    interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with _bugs_written_to(Path(tempfile.gettempdir())):
            if together.many():
                return together.lead_or_follow(lambda: _dispatch(arguments))
            return _dispatch(arguments)
    except OpenQwenError as error:
        return _fail(str(error))
    except PermissionError as error:
        return _fail(f"{error.strerror}.\n  where: {error.filename}")
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away; nothing may be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(arguments: Sequence[str]) -> int:
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if verb in ("--help", "-h", "help"):
        print(_overview())
    elif verb == "--version":
        print(f"openqwen {importlib.metadata.version('openqwen')}")
    elif verb in _FUNCTIONS:
        _call(verb, rest)
    elif verb in RECIPE_VERBS:
        {"run": _run, "serve": _serve, "report": _report, "bench": _bench}[verb](rest)
    elif verb == "pretrain" and "--sweep" in rest:
        _stage("sweep", [text for text in rest if text != "--sweep"])
    elif verb in graph.verbs():
        _stage(verb, _named(rest, "--model", "--output") if verb == "upcycle" else rest)
    else:
        near = suggestion(verb, [*RECIPE_VERBS, *graph.verbs()])
        raise OpenQwenError(
            f"There is no verb '{verb}'.{near}", do=f"{command('--help')} lists them"
        )
    return 0


def _overview() -> str:
    stages = graph.verbs()
    width = max(map(len, [*RECIPE_VERBS, *stages])) + 2
    lines = [
        "openqwen: raw text in, an aligned chat model out.",
        "",
        f"usage: {command('VERB', '...')}",
        "",
    ]
    for verbs in (RECIPE_VERBS, stages):
        lines += [f"  {name:<{width}}{text}" for name, text in verbs.items()] + [""]
    return "\n".join(
        [*lines, f"{command('VERB', '--help')} shows every flag with its meaning and default."]
    )


def _call(verb: str, arguments: Sequence[str]) -> None:
    """Read the command line into a function's arguments, and call it."""
    import tyro

    function = getattr(importlib.import_module(_FUNCTIONS[verb]), verb)
    flag = {"chat": "--model", "plan": "--recipe"}.get(verb)
    given = _bare(arguments, flag) if flag else list(arguments)
    if tyro.cli(function, args=given, prog=command(verb), description=RECIPE_VERBS[verb]) is False:
        raise OpenQwenError(
            "A proof does not hold.",
            do="see the line marked ✗; report it with the model and the data",
        )


def _run(arguments: Sequence[str]) -> None:
    from openqwen.recipe import display
    from openqwen.recipe.flags import RunOptions, parse
    from openqwen.recipe.paths import paths
    from openqwen.recipe.runner import run_recipe
    from openqwen.recipe.settings import find_recipe, load_settings

    about = f"{RECIPE_VERBS['run']} `--corpus FOLDER` is short for `--corpus.folder FOLDER`."
    if not arguments:
        raise OpenQwenError("Which recipe?", do=f"name one, such as: {command('run', 'tiny')}")
    if arguments[0] in ("--help", "-h"):
        parse(["--help"], RunOptions, graph.recipe_class()(), command("run", "RECIPE"), about)
    if arguments[0].startswith("-"):
        do = f"{command('run', 'RECIPE', arguments[0])} ..."
        raise OpenQwenError("The recipe comes first.", where=arguments[0], do=do)
    path = find_recipe(arguments[0])
    recipe: Any = load_settings(path, graph.recipe_class())
    flags = [
        "--corpus.folder" + text[8:] if text.partition("=")[0] == "--corpus" else text
        for text in arguments[1:]
    ]
    options, recipe = parse(flags, RunOptions, recipe, command("run", arguments[0]), about)
    output = options.output or Path("runs") / path.stem
    with _bugs_written_to(output):
        if not options.dry_run:
            display.note(paths())
        run_recipe(
            graph.nodes_of(recipe),
            output,
            seed=recipe.seed,
            until=options.until,
            start_from=options.from_,
            dry_run=options.dry_run,
            thorough=options.verify,
            command=command("run", *arguments),
            continue_command=command("run", *_without(arguments, "--from")),
            finish=graph.finish,
        )


def _stage(name: str, arguments: Sequence[str]) -> None:
    """A stage alone: a flag for each input, the output folder, the seed, and every field of its
    configuration.
    """
    import tyro

    from openqwen.recipe.flags import parse
    from openqwen.recipe.runner import run_alone
    from openqwen.recipe.settings import find_recipe, load_settings
    from openqwen.support.hub import local

    stage = graph.load_stage(name)
    fields: list[Any] = [
        (role.replace("-", "_"), Annotated[Path, tyro.conf.arg(help=text)])
        for role, text in stage.inputs.items()
    ]
    fields.append(
        ("output", Annotated[Path, tyro.conf.arg(help="The folder to make.", metavar="FOLDER")])
    )
    fields.append(
        (
            "seed",
            Annotated[int, tyro.conf.arg(help="Of every random draw.")],
            dataclasses.field(default=0),
        )
    )
    flags: type[Any] = dataclasses.make_dataclass("StageOptions", fields)
    settings, about, section = stage.config(), stage.help, name.replace("-", "_")
    if section in graph.sections():
        about += (
            " `--recipe RECIPE`: with that recipe's settings for this stage, which the flags then "
            "change."
        )
        if recipe := _value(arguments, "--recipe"):
            settings = getattr(load_settings(find_recipe(recipe), graph.recipe_class()), section)
            arguments = _without(arguments, "--recipe")
    options, config = parse(arguments, flags, settings, command(name), about)
    outside = {role: getattr(options, role.replace("-", "_")) for role in stage.inputs}
    outside |= {role: local(outside[role]) for role in graph.MODELS & outside.keys()}
    outside |= graph.outside_of(config)
    node = graph.Node(name, stage, config, outside=outside)
    run_alone(node, options.output, options.seed, command(name, *arguments))


def _named(arguments: Sequence[str], *flags: str) -> list[str]:
    """The arguments with the bare ones at the start given their flags, in this order."""
    count = next((n for n, text in enumerate(arguments) if text.startswith("-")), len(arguments))
    bare = min(count, len(flags))
    return [text for pair in zip(flags, arguments[:bare]) for text in pair] + list(arguments[bare:])


def _bare(arguments: Sequence[str], flag: str) -> list[str]:
    """The arguments with this flag's value in front, without the flag: `--model X` is another way
    to write X.
    """
    value = _value(arguments, flag)
    return [value, *_without(arguments, flag)] if value else list(arguments)


def _serve(arguments: Sequence[str]) -> None:
    import tyro

    from openqwen.recipe.flags import parse
    from openqwen.serve.settings import ServeConfig

    text = "A Hugging Face folder, a .gguf file or a hub id."
    model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(help=text, metavar="MODEL")]
    options: type[Any] = dataclasses.make_dataclass("ServeOptions", [("model", model)])
    given, about = _bare(arguments, "--model"), RECIPE_VERBS["serve"]
    flags, config = parse(given, options, ServeConfig(), command("serve"), about)
    try:
        from openqwen.serve.server import serve
    except ModuleNotFoundError as error:
        what = f"Serving needs the library {error.name}."
        raise OpenQwenError(what, do=pip_install("openqwen[serve]")) from None
    serve(flags.model, config)


def _bench(arguments: Sequence[str]) -> None:
    import tyro

    if not arguments or arguments[0] not in BENCHES:
        do = f"name one of {', '.join(BENCHES)}, such as: {command('bench', 'train', '--help')}"
        raise OpenQwenError("Which speed?", do=do)
    if arguments[0] == "engine":
        script = Path(__file__).parents[2] / "benchmarks" / "bench_engine.py"
        if not script.is_file():
            raise OpenQwenError(
                "This benchmark is not installed.", where=script, do="run it from a source checkout"
            )
        measure = runpy.run_path(str(script))["bench"]
        arguments = ["engine", *_bare(arguments[1:], "--model")]
    else:
        measure = importlib.import_module(f"openqwen.recipe.bench.{arguments[0]}").bench
    tyro.cli(measure, args=list(arguments[1:]), prog=command("bench", arguments[0]))


def _report(arguments: Sequence[str]) -> None:
    import tyro

    if not arguments:
        do = f"name one, such as: {command('report', 'runs/tiny')}"
        raise OpenQwenError("Which run folder?", do=do)
    text = "The folder of a run, such as runs/tiny."
    kind: Any = Annotated[Path, tyro.conf.arg(name="folder", help=text, metavar="RUN_FOLDER")]
    about = RECIPE_VERBS["report"]
    folder = tyro.cli(kind, args=list(arguments), prog=command("report"), description=about)
    if not folder.is_dir():
        raise OpenQwenError("There is no such run folder.", where=folder, do="check the path")
    from openqwen.recipe.report import write_report

    print(write_report(folder))


def _value(arguments: Sequence[str], flag: str) -> str:
    """What is given for a flag, in either spelling; nothing where it is not given."""
    pairs = zip(arguments, [*arguments[1:], ""])
    return next((a.partition("=")[2] or b for a, b in pairs if a.partition("=")[0] == flag), "")


def _without(arguments: Sequence[str], flag: str) -> list[str]:
    """The arguments without a flag and its value, in both spellings (`--flag value`,
    `--flag=value`).
    """
    kept: list[str] = []
    pieces = iter(arguments)
    for text in pieces:
        if text == flag:
            next(pieces, None)
        elif not text.startswith(f"{flag}="):
            kept.append(text)
    return kept


def _fail(message: str) -> int:
    red, plain = (
        ("\033[31m", "\033[0m")
        if sys.stderr.isatty() and "NO_COLOR" not in os.environ
        else ("", "")
    )
    print(f"{red}error:{plain} {message}", file=sys.stderr)
    return 1


@contextlib.contextmanager
def _bugs_written_to(folder: Path) -> Iterator[None]:
    """An error that nobody foresaw: its traceback goes into a file, and the user is told where
    (exit status 70).
    """
    try:
        yield
    except (OpenQwenError, PermissionError, BrokenPipeError):
        raise
    except Exception as error:
        place = folder if folder.is_dir() else Path(tempfile.gettempdir())
        file = place / f"openqwen-error-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}.txt"
        file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        what = f"This is a bug in openqwen: {type(error).__name__}: {error}"
        _fail(f"{what}\n  where: {file}\n  do:    report it with that file")
        raise SystemExit(70) from None


if __name__ == "__main__":
    sys.exit(main())
