"""Read settings from the command line: each field is a flag, `--sft.train.learning-rate`."""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from pydantic import BaseModel

from openqwen.support.errors import OpenQwenError, suggestion
from openqwen.support.settings import validate

Options = TypeVar("Options")
Settings = TypeVar("Settings", bound=BaseModel)

_Flag = tyro.conf.FlagCreatePairsOff


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The flags of `openqwen run` that are not settings of the recipe."""

    output: Annotated[
        Path | None,
        tyro.conf.arg(help="The run folder; default: runs/RECIPE.", metavar="FOLDER"),
    ] = None
    until: Annotated[
        str | None,
        tyro.conf.arg(help="Stop after this stage.", metavar="STAGE"),
    ] = None
    from_: Annotated[
        str | None,
        tyro.conf.arg(help="Remake this stage and all later ones.", metavar="STAGE", name="from"),
    ] = None
    dry_run: Annotated[
        bool,
        _Flag,
        tyro.conf.arg(help="Print what the run would do, and change nothing."),
    ] = False
    verify: Annotated[
        bool,
        _Flag,
        tyro.conf.arg(help="Check the content of files over 1 GB too."),
    ] = False


def parse(
    arguments: Sequence[str],
    options: type[Options],
    settings: Settings,
    prog: str,
    description: str,
) -> tuple[Options, Settings]:
    """Parse the command line into options and settings.

    `--help` prints every field with its meaning and default, and exits. A value of the wrong type
    exits with status 2 and the help of its flag.

    Args:
        arguments: The command line.
        options: A dataclass of flags that are not settings.
        settings: The settings; their present values are the defaults.
        prog, description: Shown by `--help`.

    Returns: The options and the settings.

    Raises:
        OpenQwenError: For an unknown flag, or a value out of range.
    """
    mirror = _mirror(settings)
    unnamed = tyro.conf.arg(name="")
    fields = [("options", Annotated[options, unnamed]), ("settings", Annotated[mirror, unnamed])]
    both: Any = dataclasses.make_dataclass("Arguments", fields)
    parsed, unknown = tyro.cli(
        both,
        args=list(arguments),
        prog=prog,
        description=description,
        return_unknown_args=True,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.HelptextFromCommentsOff),
    )
    if unknown:
        known = [f"--{dotted}" for dotted in [*_dotted(options), *_dotted(mirror)]]
        raise _unknown(unknown, known, prog)
    values = validate(type(settings), _plain(parsed.settings), "the command line")
    return parsed.options, values


def _mirror(settings: BaseModel) -> type:
    """Return a dataclass of the settings for tyro, without checks; pydantic checks the result."""
    fields: list[Any] = []
    for name, info in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel) or _is_table(value):
            entries = value.items() if isinstance(value, dict) else ()
            table = [(key, _mirror(entry)) for key, entry in entries]
            nested = dataclasses.make_dataclass("Table", table) if table else _mirror(value)
            nested.__doc__ = info.description or ""
            fields.append((name, nested))
        else:
            kind: Any = info.annotation
            flag = name.rstrip("_").replace("_", "-")  # `import_` is the flag --import
            renamed = flag if name.endswith("_") else None
            leaf = Annotated[kind, tyro.conf.arg(help=info.description, name=renamed)]
            default = dataclasses.field(default_factory=functools.partial(copy.copy, value))
            fields.append((name, leaf, default))
    # Nested settings have no default. `kw_only` allows them after fields that have one.
    return dataclasses.make_dataclass(type(settings).__name__, fields, kw_only=True)


def _is_table(value: Any) -> bool:
    """Return whether a value is a dict of settings, such as one entry for each source."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(v, BaseModel) and str(k).isidentifier() for k, v in value.items())


def _plain(mirrored: Any) -> dict[str, Any]:
    values = {field.name: getattr(mirrored, field.name) for field in dataclasses.fields(mirrored)}
    return {
        name: _plain(value) if dataclasses.is_dataclass(value) else value
        for name, value in values.items()
    }


def _dotted(kind: Any, prefix: str = "") -> list[str]:
    """Return every flag of a dataclass of settings as a user types it, without the dashes."""
    names = []
    for field in dataclasses.fields(kind):
        name = prefix + field.name.rstrip("_").replace("_", "-")
        names += _dotted(field.type, f"{name}.") if dataclasses.is_dataclass(field.type) else [name]
    return names


def _unknown(unknown: Sequence[str], known: Sequence[str], prog: str) -> OpenQwenError:
    flag = next((text for text in unknown if text.startswith("-")), None)
    do = f"{prog} --help lists every flag"
    if flag is None:
        near = suggestion(f"--{unknown[0]}", known)
        return OpenQwenError(f"Unexpected argument '{unknown[0]}'.{near}", "the command line", do)
    name = flag.partition("=")[0].replace("_", "-")
    if name in known:  # a table has flags for its entries only
        do = f"set an entry: {name}.KEY VALUE"
        return OpenQwenError(f"'{name}' is a table.", where="the command line", do=do)
    last_words = {f"--{text.rpartition('.')[2]}" for text in known}
    near = suggestion(name, known) or suggestion(name, last_words)
    return OpenQwenError(f"There is no flag '{name}'.{near}", where="the command line", do=do)
