"""Settings from the command line: every field of a settings class is a dotted flag
(`--sft.train.learning-rate`).
"""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from pydantic import BaseModel

from openqwen.recipe.settings import validate
from openqwen.support.errors import OpenQwenError, suggestion

Options = TypeVar("Options")
Settings = TypeVar("Settings", bound=BaseModel)

_Flag = tyro.conf.FlagCreatePairsOff


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The flags of `openqwen run` that are not settings of the recipe."""

    output: Annotated[
        Path | None, tyro.conf.arg(help="The run folder; none: runs/RECIPE.", metavar="FOLDER")
    ] = None
    until: Annotated[str | None, tyro.conf.arg(help="Stop after this stage.", metavar="STAGE")] = (
        None
    )
    from_: Annotated[
        str | None,
        tyro.conf.arg(
            help="Make this stage and all later ones anew.", metavar="STAGE", name="from"
        ),
    ] = None
    dry_run: Annotated[
        bool, _Flag, tyro.conf.arg(help="Print what would happen, and do nothing.")
    ] = False
    verify: Annotated[
        bool, _Flag, tyro.conf.arg(help="Check files over 1 GB byte by byte too.")
    ] = False


def parse(
    arguments: Sequence[str],
    options: type[Options],
    settings: Settings,
    prog: str,
    description: str,
) -> tuple[Options, Settings]:
    """Read the command line into a dataclass of options and a settings object, whose present values
    are the defaults.

    `--help` prints every field with its meaning and default, and exits. A value of the wrong type
    exits with status 2 and the help of its flag; an unknown flag or a value out of range is an
    OpenQwenError.
    """
    mirror = _mirror(settings)
    fields = [
        (name, Annotated[kind, tyro.conf.arg(name="")])
        for name, kind in [("own", options), ("all", mirror)]
    ]
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
    return parsed.own, validate(type(settings), _plain(parsed.all), "the command line")


def _mirror(settings: BaseModel) -> type:
    """The settings as a dataclass without their checks: tyro reads it, and pydantic checks the
    whole once, after.
    """
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
            leaf = Annotated[kind, tyro.conf.arg(help=info.description)]
            fields.append(
                (name, leaf, dataclasses.field(default_factory=functools.partial(copy.copy, value)))
            )
    # `kw_only`, so that nested settings, which have no default of their own, may follow plain
    # fields.
    return dataclasses.make_dataclass(type(settings).__name__, fields, kw_only=True)


def _is_table(value: Any) -> bool:
    """Whether it is named settings, such as one entry a source."""
    named = isinstance(value, dict) and bool(value)
    return named and all(
        isinstance(v, BaseModel) and str(k).isidentifier() for k, v in value.items()
    )


def _plain(mirrored: Any) -> dict[str, Any]:
    values = {field.name: getattr(mirrored, field.name) for field in dataclasses.fields(mirrored)}
    return {
        name: _plain(value) if dataclasses.is_dataclass(value) else value
        for name, value in values.items()
    }


def _dotted(kind: Any, prefix: str = "") -> list[str]:
    """Every flag of a dataclass of settings, as a user types it."""
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
    if name in known:  # a table has a flag for each entry and none of its own
        return OpenQwenError(
            f"'{name}' is a table.", where="the command line", do=f"set an entry: {name}.KEY VALUE"
        )
    near = suggestion(name, known) or suggestion(
        name, {f"--{text.rpartition('.')[2]}" for text in known}
    )
    return OpenQwenError(f"There is no flag '{name}'.{near}", where="the command line", do=do)
