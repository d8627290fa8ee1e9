"""What every typed configuration shares."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Settings(BaseModel):
    """A configuration object: each field has its meaning and default; an unknown key is an error.

    A mapping given for a field changes the keys that it names; the others keep the values of the
    field's own default, at every depth. An object given for a field replaces the default.
    """

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _onto_defaults(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        fields = cls.model_fields
        return {
            name: _onto(fields[name].get_default(call_default_factory=True), value)
            if name in fields and isinstance(value, Mapping)
            else value
            for name, value in given.items()
        }


def _onto(default: Any, given: Any) -> Any:
    """A given mapping over a default: settings keep what is not named, other mappings are replaced.

    An entry of a replaced mapping, such as one network of a sweep, keeps what its namesake has.
    """
    if not isinstance(given, Mapping) or not isinstance(default, BaseModel | Mapping):
        return given
    own = dict(default)
    named = {name: _onto(own.get(name), value) for name, value in given.items()}
    return {**own, **named} if isinstance(default, BaseModel) else named
