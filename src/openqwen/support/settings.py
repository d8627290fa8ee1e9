"""The base class of every configuration, and errors that name the wrong key."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from openqwen.support.errors import OpenQwenError, suggestion

Configuration = TypeVar("Configuration", bound=BaseModel)
Quantization = Literal["int8", "int4"]  # of a model's weights; see model/quantize.py


class Settings(BaseModel):
    """A configuration: fields with descriptions and defaults; an unknown key is an error.

    A mapping given for a field changes the keys that it names; all others keep the values of the
    field's default, at every depth. An object given for a field replaces the default.
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _onto_defaults(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        values = dict(given)
        for name, value in given.items():
            if name in cls.model_fields and isinstance(value, Mapping):
                default = cls.model_fields[name].get_default(call_default_factory=True)
                values[name] = _onto(default, value)
        return values


def _onto(default: Any, given: Any) -> Any:
    """Merge a given value into a default.

    Settings keep the fields that a given mapping does not name. Any other mapping is replaced, but
    an entry of it, such as one network of a sweep, is merged into the default's entry of that name.
    """
    if not isinstance(given, Mapping) or not isinstance(default, BaseModel | Mapping):
        return given
    defaults = dict(default)
    merged = {name: _onto(defaults.get(name), value) for name, value in given.items()}
    return {**defaults, **merged} if isinstance(default, BaseModel) else merged


def validate(
    settings: type[Configuration],
    data: Mapping[str, Any],
    where: Path | str,
    lines: Mapping[str, int] | None = None,
) -> Configuration:
    """Build the settings; where, lines (dotted key -> line): the place that errors name."""
    try:
        return settings.model_validate(data)
    except ValidationError as failure:
        errors = failure.errors(include_url=False)
    first, *others = [_sentence(settings, error) for error in errors]
    dotted = _dotted(errors[0])
    line = (lines or {}).get(dotted)
    place = f"{where}:{line}" if line else f"{where}"
    do = f"fix these too: {' '.join(others)}" if others else None
    raise OpenQwenError(first, where=f"{place}, key {dotted}" if dotted else place, do=do)


def _dotted(error: ErrorDetails) -> str:
    return ".".join(str(part) for part in error["loc"])


def _sentence(settings: type[BaseModel], error: ErrorDetails) -> str:
    """Return one sentence for an error of pydantic: `seed is 'x', but it should be integer.`"""
    dotted = _dotted(error)
    if error["type"] == "extra_forbidden":
        return f"There is no key '{dotted}'.{_nearest(settings, error['loc'])}"
    if error["type"] == "missing":
        return f"The key '{dotted}' is missing."
    message = error["msg"].removeprefix("Value error, ")
    if message.startswith("Input should be "):
        expected = message.removeprefix("Input should be ").split(", unable to")[0]
        expected = expected.removeprefix("a valid ")
        return f"{dotted} is {_brief(error['input'])}, but it should be {expected}."
    return f"{dotted}: {message}." if dotted else f"{message}."


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _nearest(settings: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """Return the suggestion for an unknown key: the nearest key of its level, or all of them."""
    level: Any = settings
    for part in loc[:-1]:
        inner = level and level.model_fields.get(part)
        level = inner and _model_of(inner.annotation)
    known = list(level.model_fields) if level else []
    key = str(loc[-1])
    near = suggestion(key.replace("-", "_"), known)
    return near or (f" Known here: {', '.join(known)}." if known else "")


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """Return the settings class in an annotation such as `Train | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for arg in get_args(annotation) if (model := _model_of(arg))), None)
