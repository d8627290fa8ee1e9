"""JSON schemas made ready for llguidance: closed, and without what it cannot follow."""

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import unquote

from openqwen.support.errors import OpenQwenError

try:
    import llguidance
except ImportError:  # an extra
    llguidance = None  # type: ignore[assignment]

Json = dict[str, Any]
LENIENT: Any = {"lenient": True}  # llguidance passes over keywords that it does not know
_MAPS = ("properties", "patternProperties", "$defs", "definitions")  # schemas by name
_SAME = ("anyOf", "oneOf", "allOf")  # lists of schemas of the very same value
_NESTED = (*_MAPS, *_SAME, "$ref", "prefixItems", "items", "additionalProperties")
_NONE: frozenset[str] = frozenset()


def ready(schema: Json, strict: bool = False) -> Json:
    """A copy whose objects hold no other keys than it names, as in xgrammar's strict mode.

    An object keeps what it says itself of other keys (additionalProperties). One that names no
    keys stays open, unless `strict`. A tuple (prefixItems) has no more items than it names.
    Expressions that llguidance cannot read are left out, unless `strict`: `faults` finds them.

    Raises: OpenQwenError for a schema that is nested too deep.
    """
    try:
        return _Reader(schema, strict).whole()
    except RecursionError:
        message = "The JSON schema is nested too deep."
        raise OpenQwenError(message, where="sampling, structure") from None


def faults(schema: Json, strict: bool = False) -> list[str]:
    """What llguidance cannot follow in a schema that is `ready`, each with its place.

    As in "properties.path: Unknown format: path". Without `strict` only what it refuses.
    """
    whole = _complaints(schema, strict)
    found = []
    for path, node in _nodes(schema) if whole else ():
        own = {key: value for key, value in node.items() if key not in _NESTED}
        if patterns := _map(node, "patternProperties"):
            own["patternProperties"] = dict.fromkeys(patterns, True)
        found += [f"{path}: {words}" if path else words for words in _complaints(own, strict)]
    return found or whole


def _complaints(schema: Json, strict: bool = False) -> list[str]:
    make = llguidance.LLMatcher
    try:
        grammar = make.grammar_from_json_schema(json.dumps(schema), overrides=LENIENT)
        failed, words = make.validate_grammar_with_warnings(grammar)
    except ValueError as error:
        failed, words = True, [str(error)]
    lines = words if failed or strict else []
    return [" ".join(word for word in line.split() if word.strip("^"))[:200] for line in lines]


class _Reader:
    """Makes one schema `ready`."""

    def __init__(self, root: Json, strict: bool):
        self._root, self._strict = root, strict
        self._open: Json = {}  # definitions as parts of an object that is closed as a whole

    def whole(self) -> Json:
        out = self._read(self._root)
        out.pop("x-guidance", None)  # llguidance's own settings, which are not the client's
        if self._open:
            out["$defs"] = _map(out, "$defs") | self._open
        return out

    def _read(self, node: Any, part: bool = False) -> Any:
        """part: another schema of the same value says which keys there are."""
        if not isinstance(node, dict):
            return node
        # An object whose keys are named in several places is closed here, and not in those.
        sources = sum(key in node for key in ("properties", "anyOf", "oneOf", "$ref"))
        sources += len(_list(node, "allOf"))
        mixed = not part and sources > 1
        out = _mapped(node, lambda key, _, one: self._read(one, (part or mixed) and key in _SAME))
        if (part or mixed) and (reference := _reference(node)):
            out["$ref"] = self._opened(reference)
        for key in () if self._strict else _unreadable(node):
            del out[key]
        if "prefixItems" in out or isinstance(out.get("items"), list):
            out.setdefault("items" if "prefixItems" in out else "additionalItems", False)
        places = list(_places(node, self._root)) if mixed else [node]
        dropped = "patternProperties" in node and "patternProperties" not in out
        if not part and not dropped and not any(map(_says, places)):
            for key in _MAPS[:2] if mixed else ():
                if names := {name: True for one in places for name in _map(one, key)}:
                    out[key] = names | _map(out, key)
            named = out.get("properties")
            if isinstance(named, dict) and "patternProperties" not in out and not self._strict:
                # Keys that are required, but described nowhere.
                required = [name for one in places for name in _list(one, "required")]
                fresh = [name for name in required if isinstance(name, str) and name not in named]
                out["properties"] = named | dict.fromkeys(fresh, True)
            out.pop("unevaluatedProperties", None)
            kinds = (node.get("type"), *_list(node, "type"))
            nameless = self._strict and not sources and "object" in kinds
            if nameless or "properties" in out or "patternProperties" in out:
                out["additionalProperties"] = False
        if "properties" in out:
            out.setdefault("type", "object")
        return out

    def _opened(self, reference: str) -> str:
        """A reference to the same definition, left open; it may refer to itself."""
        name = f"open-{hashlib.sha256(reference.encode()).hexdigest()[:16]}"
        if reference.startswith("#/$defs/open-"):  # of a schema that was made ready before
            name = reference.removeprefix("#/$defs/")
        target = _target(reference, self._root)
        if target is None:
            return reference
        if name not in self._open:
            self._open[name] = True
            self._open[name] = self._read(target, part=True)
        return f"#/$defs/{name}"


def _says(node: Json) -> bool:
    """Whether a schema says what other keys there may be than it names."""
    return "additionalProperties" in node or bool(node.get("unevaluatedProperties", False))


def _unreadable(node: Json) -> list[str]:
    """Keywords whose regular expressions llguidance cannot read."""
    found: list[str] = []
    for key in ("pattern", "patternProperties"):
        value = dict.fromkeys(_map(node, key), True) or node.get(key)
        if key in node and _complaints({key: value}):
            found.append(key)
    return found


def _mapped(node: Json, change: Callable[[str, str, Any], Any]) -> Json:
    """A copy in which change(keyword, place, schema) stands for every schema directly in it."""
    out = dict(node)
    for key, value in node.items():
        if key in _MAPS and isinstance(value, dict):
            out[key] = {name: change(key, f"{key}.{name}", one) for name, one in value.items()}
        elif key in (*_SAME, "prefixItems", "items") and isinstance(value, list):
            out[key] = [change(key, f"{key}[{n}]", one) for n, one in enumerate(value)]
        elif key in ("items", "additionalProperties"):
            out[key] = change(key, key, value)
    return out


def _nodes(node: Any, path: str = "") -> list[tuple[str, Json]]:
    """A schema and all within it, with their places."""
    if not isinstance(node, dict):
        return []
    found = [(path, node)]
    _mapped(node, lambda _, place, one: found.extend(_nodes(one, f"{path}.{place}".lstrip("."))))
    return found


def _places(node: Any, root: Json, seen: frozenset[str] = _NONE) -> Iterator[Json]:
    """The schemas of the same value: this one, its alternatives and what it refers to."""
    if not isinstance(node, dict):
        return
    yield node
    for key in _SAME:
        for one in _list(node, key):
            yield from _places(one, root, seen)
    if (reference := _reference(node)) and reference not in seen:
        yield from _places(_target(reference, root), root, seen | {reference})


def _reference(node: Json) -> str | None:
    reference = node.get("$ref")
    return reference if isinstance(reference, str) else None


def _target(reference: str, root: Json) -> Any:
    """What "#/$defs/name" refers to; None where there is no such thing (llguidance says so)."""
    node: Any = root
    try:
        for step in unquote(reference).removeprefix("#").split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            node = node[int(key)] if isinstance(node, list) else node[key]
    except (LookupError, TypeError, ValueError):
        return None
    return node


def _list(node: Json, key: str) -> list[Any]:
    value = node.get(key)
    return value if isinstance(value, list) else []


def _map(node: Json, key: str) -> Json:
    value = node.get(key)
    return value if isinstance(value, dict) else {}
