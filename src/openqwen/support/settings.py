"""The base class of every configuration."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


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
