"""`openqwen VERB ...`: one command with one verb for each stage.

The code of a verb is loaded when that verb is used.
"""

import contextlib
import dataclasses
import importlib.metadata
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from openqwen.recipe import graph, ranks
from openqwen.support.command import command, pip_install
from openqwen.support.errors import OpenQwenError, suggestion

RECIPE_VERBS = {
    "run": "Run a whole recipe, from raw text to a chat model. It can be interrupted and resumed.",
    "chat": "Talk to a model in the terminal.",
    "serve": "Serve a model over HTTP: OpenAI's API and a chat page.",
    "inspect": "Browse demonstrations, preferences, tasks or documents on a page.",
    "annotate": "Let people rank responses and write demonstrations, on a site of their own.",
    "instructions tree": "Merge, rename, move and drop tags of `instructions tag`, on a page.",
    "convert": "Convert a checkpoint: folder, .gguf file or hub id to folder or .gguf file.",
    "quantize": "Store weights in 8 or 4 bits, for a CPU.",
    "report": "Write the HTML report of a run folder.",
    "reward score": "Score the answers of a file with a reward model.",
    "preview": "Show what SFT would learn from demonstrations, token by token.",
    "plan": "Estimate memory, speed and time of each training stage on given devices.",
    "sandbox": "Run a program that nobody trusts, try this machine's sandbox, or serve it.",
    "verify": "Prove on your model and data that packing, cutting, resuming and caching are exact.",
}
# Verbs whose flags are the arguments of one function, and the function's module.
_FUNCTIONS = {
    "chat": "openqwen.serve.terminal",
    "convert": "openqwen.train.convert",
    "quantize": "openqwen.train.quantize",
    "preview": "openqwen.train.preview",
    "plan": "openqwen.recipe.plan_devices",
    "reward score": "openqwen.evaluate.score_file",
    "sandbox": "openqwen.sandbox.command",
    "verify": "openqwen.recipe.verify",
}
# Verbs of several methods, each a stage of its own: `synthesize METHOD` is the stage
# `synthesize-METHOD`.
_GROUPS = {
    "synthesize": "Make demonstrations D, preferences P and documents from files, without people.",
    "instructions": "Make a pool of instructions ready for annotation, step by step.",
}
# Verbs that serve over HTTP: the class of their settings, their function, and their argument.
_SERVERS: dict[str, tuple[str, str, tuple[str, str] | None]] = {
    "serve": (
        "openqwen.serve.settings:ServeConfig",
        "openqwen.serve.server:serve",
        ("MODEL", "A Hugging Face folder, a .gguf file or a hub id."),
    ),
    "inspect": (
        "openqwen.instruct.inspect.settings:InspectConfig",
        "openqwen.instruct.inspect.app:inspect",
        ("FILE", "A data file, a folder of data files, or hub:owner/name:split."),
    ),
    "annotate": (
        "openqwen.instruct.collaborate.settings:AnnotateConfig",
        "openqwen.instruct.collaborate.app:annotate",
        ("PROJECT", "The project's folder; a new one is made."),
    ),
    "instructions tree": (
        "openqwen.instruct.collaborate.tree_site:TreeConfig",
        "openqwen.instruct.collaborate.tree_site:tree",
        ("FOLDER", "An artifact of `instructions tag`."),
    ),
    "sandbox": (
        "openqwen.serve.settings:SandboxConfig",
        "openqwen.serve.sandbox:serve_sandbox",
        None,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    Returns:
        0: success. 1: an error that the user can mend. 70: a bug. 130: interrupted by Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        with _bug_report_in(Path(tempfile.gettempdir())):
            if ranks.under_torchrun():
                return ranks.lead_or_follow(lambda: _dispatch(arguments))
            return _dispatch(arguments)
    except OpenQwenError as error:
        return _fail(str(error))
    except PermissionError as error:
        return _fail(f"{error.strerror}.\n  where: {error.filename}")
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has closed it; nothing may be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(arguments: Sequence[str]) -> int:
    verb, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if " ".join(arguments[:2]) in RECIPE_VERBS and len(arguments) > 1:  # a verb of two words
        verb, rest = " ".join(arguments[:2]), arguments[2:]
    elif verb in _GROUPS:
        verb, rest = _method(verb, rest)
    if verb in ("--help", "-h", "help"):
        print(_overview())
    elif verb == "--version":
        print(f"openqwen {importlib.metadata.version('openqwen')}")
    elif verb in _SERVERS and (verb not in _FUNCTIONS or "--serve" in rest):
        _serve(verb, rest)
    elif verb in _FUNCTIONS:
        _call(verb, rest)
    elif verb in RECIPE_VERBS:
        {"run": _run, "report": _report}[verb](rest)
    elif verb == "evaluate" and not _value(rest, "--corpus"):
        _evaluate(rest)
    elif verb == "pretrain" and "--sweep" in rest:
        _stage("sweep", [text for text in rest if text != "--sweep"])
    elif verb in graph.verbs():
        reorder = {"upcycle": _upcycle_flags, "merge": _merge_flags}.get(verb)
        if verb.startswith("instructions-"):
            reorder = _pool_flag
        _stage(verb, reorder(rest) if reorder else rest)
    elif verb == "bench":  # until 0.2
        do = "run benchmarks/bench_train.py, bench_engine.py or bench_serve.py of a source checkout"
        raise OpenQwenError("The verb 'bench' was removed.", do=do)
    else:
        near = suggestion(verb, [*RECIPE_VERBS, *graph.verbs()])
        do = f"{command('--help')} lists them"
        raise OpenQwenError(f"There is no verb '{verb}'.{near}", do=do)
    return 0


def _method(group: str, arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Turn `synthesize METHOD ...` into the stage of that method and its arguments."""
    stages = graph.verbs()
    texts = {" ".join(_words(name)): text for name, text in stages.items()} | RECIPE_VERBS
    start = f"{group} "
    methods = {name.removeprefix(start): texts[name] for name in texts if name.startswith(start)}
    if not arguments or arguments[0] in ("--help", "-h"):
        lines = [f"usage: {command(group, 'METHOD', '...')}", "", _GROUPS[group], "", "Methods:"]
        lines += [f"  {name:<14}{text}" for name, text in methods.items()]
        print("\n".join(lines))
        raise SystemExit(0)
    if arguments[0] not in methods:
        what = f"There is no method '{arguments[0]}'.{suggestion(arguments[0], methods)}"
        raise OpenQwenError(what, group, f"use one of: {', '.join(methods)}")
    return f"{group}-{arguments[0]}", arguments[1:]


def _words(name: str) -> list[str]:
    """The words that name a stage on the command line: `synthesize rejection`, `online-dpo`."""
    group, _, method = name.partition("-")
    return [group, method] if group in _GROUPS and method else [name]


def _overview() -> str:
    stages = {" ".join(_words(name)): text for name, text in graph.verbs().items()}
    width = max(map(len, [*RECIPE_VERBS, *stages])) + 2
    lines = ["openqwen: from raw text to an aligned chat model.", ""]
    lines += [f"usage: {command('VERB', '...')}", ""]
    for title, verbs in (("Recipes and models:", RECIPE_VERBS), ("Stages:", stages)):
        lines += [title, *(f"  {name:<{width}}{text}" for name, text in verbs.items()), ""]
    lines.append(f"{command('VERB', '--help')} shows every flag with its meaning and default.")
    return "\n".join(lines)


def _call(verb: str, arguments: Sequence[str]) -> None:
    """Parse the command line into the arguments of the verb's function, and call it."""
    import tyro

    function = getattr(importlib.import_module(_FUNCTIONS[verb]), verb.replace(" ", "_"))
    flag = {"chat": "--model", "plan": "--recipe"}.get(verb)
    args = _without_flag(arguments, flag) if flag else list(arguments)
    prog, about = command(*verb.split()), RECIPE_VERBS[verb]
    if tyro.cli(function, args=args, prog=prog, description=about) is False:
        do = "see the line marked ✗; report it with the model and the data"
        raise OpenQwenError("A proof does not hold.", do=do)


def _evaluate(arguments: Sequence[str]) -> None:
    """Score a model on benchmarks, or compare results; `--corpus` asks for the recipes' stage."""
    import tyro

    from openqwen.evaluate import command as benchmarks

    if arguments[:1] == ["compare"]:
        tyro.cli(benchmarks.compare, args=list(arguments[1:]), prog=command("evaluate", "compare"))
    else:
        args = _without_flag(arguments, "--model")
        about = f"{benchmarks.ABOUT} {command('evaluate', '--corpus', 'FOLDER', '--help')}"
        tyro.cli(benchmarks.evaluate, args=args, prog=command("evaluate"), description=about)


def _run(arguments: Sequence[str]) -> None:
    from openqwen.recipe import display
    from openqwen.recipe.flags import RunOptions, parse
    from openqwen.recipe.paths import paths
    from openqwen.recipe.report import finish
    from openqwen.recipe.runner import run_recipe
    from openqwen.recipe.settings import find_recipe, load_settings

    about = f"{RECIPE_VERBS['run']} `--corpus FOLDER` is short for `--corpus.folder FOLDER`."
    if not arguments:
        do = f"name one, such as: {command('run', 'tiny')}"
        raise OpenQwenError("No recipe is named.", do=do)
    if arguments[0] in ("--help", "-h"):
        parse(["--help"], RunOptions, graph.recipe_class()(), command("run", "RECIPE"), about)
    if arguments[0].startswith("-"):
        do = f"{command('run', 'RECIPE', arguments[0])} ..."
        raise OpenQwenError("The recipe must be the first argument.", where=arguments[0], do=do)
    path = find_recipe(arguments[0])
    alone = load_settings(path, graph.recipe_class(alone=True)).model_fields_set
    if others := sorted(alone - graph.recipe_class().model_fields.keys()):
        what = f"`run` does not run the stage of the section '{others[0]}'."
        do = "run the stages one by one, as the file's comment says: "
        do += command(*_words(others[0].replace("_", "-")), "--recipe", arguments[0], "...")
        raise OpenQwenError(what, path, do)
    recipe: Any = load_settings(path, graph.recipe_class())
    flags = [
        "--corpus.folder" + text[8:] if text.partition("=")[0] == "--corpus" else text
        for text in arguments[1:]
    ]
    options, recipe = parse(flags, RunOptions, recipe, command("run", arguments[0]), about)
    output = options.output or Path("runs") / path.stem
    with _bug_report_in(output):
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
            continue_command=command("run", *_drop(arguments, "--from")),
            finish=finish,
        )


def _stage(name: str, arguments: Sequence[str]) -> None:
    """Run one stage alone.

    Its flags: one for each input, the output folder, the seed, every field of its configuration.
    """
    from openqwen.recipe.flags import parse
    from openqwen.recipe.runner import run_alone
    from openqwen.recipe.settings import find_recipe, load_settings
    from openqwen.support.hub import local

    stage = graph.load_stage(name)
    settings, about, section = stage.config(), stage.help, name.replace("-", "_")
    if section in graph.sections(alone=True):
        about += " `--recipe RECIPE` takes that recipe's settings for this stage as defaults."
        if recipe := _value(arguments, "--recipe"):
            every = graph.recipe_class(alone=True)
            settings = getattr(load_settings(find_recipe(recipe), every), section)
            arguments = _drop(arguments, "--recipe")
    options, config = parse(
        arguments, _stage_options(stage), settings, command(*_words(name)), about
    )
    outside = {role: getattr(options, role.replace("-", "_")) for role in stage.inputs}
    outside = {role: path for role, path in outside.items() if path is not None}
    outside |= {role: local(outside[role]) for role in graph.MODELS & outside.keys()}
    outside |= graph.outside_of(config)
    node = graph.Node(name, stage, config, outside=outside)
    run_alone(node, options.output, options.seed, command(*_words(name), *arguments))
    if name == "instructions-tag":
        print(f"Refine its tree on a page: {command('instructions', 'tree', options.output)}")


def _stage_options(stage: Any) -> type[Any]:
    """Return the class of the flags of a stage that are not fields of its configuration."""
    import tyro

    fields: list[Any] = []
    optional: list[Any] = []
    for role, text in stage.inputs.items():
        kind: Any = Annotated[Path, tyro.conf.arg(help=text)]
        if role in stage.optional:
            kind = Annotated[Path | None, tyro.conf.arg(help=text)]
            optional.append((role.replace("-", "_"), kind, dataclasses.field(default=None)))
        else:
            fields.append((role.replace("-", "_"), kind))
    output = tyro.conf.arg(help="The folder to make.", metavar="FOLDER")
    seed = tyro.conf.arg(help="Seed of every random draw.")
    fields.append(("output", Annotated[Path, output]))
    fields.append(("seed", Annotated[int, seed], dataclasses.field(default=0)))
    fields += optional
    return dataclasses.make_dataclass("StageOptions", fields)


def _serve(verb: str, arguments: Sequence[str]) -> None:
    """Parse the command line of a verb that serves over HTTP, and serve."""
    import tyro

    from openqwen.recipe.flags import parse

    settings, function, argument = _SERVERS[verb]
    fields: list[Any] = []
    if argument:
        metavar, text = argument
        about = tyro.conf.arg(help=text, metavar=metavar)
        fields.append(("source", Annotated[str, tyro.conf.Positional, about]))
    options: type[Any] = dataclasses.make_dataclass("ServeOptions", fields)
    given = [text for text in _without_flag(arguments, "--model") if text != "--serve"]
    program = command(*verb.split()) if argument else command(verb, "--serve")
    flags, config = parse(given, options, _named(settings)(), program, RECIPE_VERBS[verb])
    try:
        serve = _named(function)
    except ModuleNotFoundError as error:
        what = f"Serving needs the library {error.name}."
        extra = "annotate" if verb == "annotate" else "serve"
        raise OpenQwenError(what, do=pip_install(f"openqwen[{extra}]")) from None
    serve(*([flags.source] if argument else []), config)


def _named(place: str) -> Any:
    """The object that "module:name" names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _report(arguments: Sequence[str]) -> None:
    import tyro

    if not arguments:
        do = f"name one, such as: {command('report', 'runs/tiny')}"
        raise OpenQwenError("No run folder is named.", do=do)
    text = "The folder of a run, such as runs/tiny."
    kind: Any = Annotated[Path, tyro.conf.arg(name="folder", help=text, metavar="RUN_FOLDER")]
    about = RECIPE_VERBS["report"]
    folder = tyro.cli(kind, args=list(arguments), prog=command("report"), description=about)
    from openqwen.recipe.report import write_report

    print(write_report(folder))


def _merge_flags(arguments: Sequence[str]) -> list[str]:
    """Put `--base` and `--models` before the positional arguments, wherever they stand."""
    flags, folders = list[str](), list[str]()
    waits = ""  # for values of this flag
    for text in arguments:
        if text.startswith("--") or text == "-h":
            alone = "=" in text or text in ("--normalize", "--no-normalize", "--help", "-h")
            flags, waits = [*flags, text], "" if alone else text
        elif waits == "--models" or (waits == "--weights" and _is_number(text)):
            flags.append(text)  # they take all that follow
        elif waits and waits != "--weights":
            flags, waits = [*flags, text], ""
        else:
            folders, waits = [*folders, text], ""
    base = ["--base", folders.pop(0)] if folders and "--base" not in flags else []
    return [*base, *(["--models", *folders] if folders else []), *flags]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _pool_flag(arguments: Sequence[str]) -> list[str]:
    """Put the flag of the pool before a positional argument at the start."""
    named = arguments[:1] and not arguments[0].startswith("-")
    return ["--instructions", *arguments] if named else list(arguments)


def _upcycle_flags(arguments: Sequence[str]) -> list[str]:
    """Put the flags of the two folders before the positional arguments at the start."""
    flags = ("--model", "--output")
    count = next((n for n, text in enumerate(arguments) if text.startswith("-")), len(arguments))
    count = min(count, len(flags))
    pairs = zip(flags, arguments[:count])
    return [text for pair in pairs for text in pair] + list(arguments[count:])


def _without_flag(arguments: Sequence[str], flag: str) -> list[str]:
    """Turn `--model X` into the positional argument X, at the start."""
    value = _value(arguments, flag)
    return [value, *_drop(arguments, flag)] if value else list(arguments)


def _value(arguments: Sequence[str], flag: str) -> str:
    """Return the value of a flag (`--flag value` or `--flag=value`), or an empty string."""
    pairs = zip(arguments, [*arguments[1:], ""])
    return next((a.partition("=")[2] or b for a, b in pairs if a.partition("=")[0] == flag), "")


def _drop(arguments: Sequence[str], flag: str) -> list[str]:
    """Remove a flag and its value, in both spellings (`--flag value`, `--flag=value`)."""
    kept: list[str] = []
    rest = iter(arguments)
    for text in rest:
        if text == flag:
            next(rest, None)
        elif not text.startswith(f"{flag}="):
            kept.append(text)
    return kept


def _fail(message: str) -> int:
    colored = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    red, plain = ("\033[31m", "\033[0m") if colored else ("", "")
    print(f"{red}error:{plain} {message}", file=sys.stderr)
    return 1


@contextlib.contextmanager
def _bug_report_in(folder: Path) -> Iterator[None]:
    """Write the traceback of an unexpected error to a file, name the file, exit with status 70."""
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
