"""A response with one instruction, and what a kind of instruction is."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "less than": operator.lt,
    "at least": operator.ge,
    "moins de": operator.lt,
    "au moins": operator.ge,
    "al menos": operator.ge,
    "como máximo": operator.le,
    "未満": operator.lt,
    "以上": operator.ge,
}


@dataclass(frozen=True)
class Case:
    """A response, the parameters of an instruction, and the language of both.

    mended: check what the instruction says where the reference checks something else.
    """

    text: str
    parameters: Mapping[str, Any]
    language: str
    mended: bool = False

    def __getitem__(self, name: str) -> Any:
        value = self.parameters[name]
        return value.strip() if isinstance(value, str) else value

    def compares(self, count: int, name: str, relation: str = "relation") -> bool:
        """Whether a count stands in the given relation to a parameter."""
        return RELATIONS[self[relation]](count, self[name])


@dataclass(frozen=True)
class Kind:
    """A kind of instruction.

    Args:
        follows: whether a response follows it.
        needs: names of its parameters; those that end with "?" may be absent.
        languages: those in which it exists.
    """

    follows: Callable[[Case], bool]
    needs: str = ""
    languages: tuple[str, ...] = ("en", "fr", "es", "ja")
