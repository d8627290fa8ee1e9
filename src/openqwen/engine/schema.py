"""JSON schemas prepared for llguidance: closed objects, and no keywords that it cannot follow."""

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
LENIENT: Any = {"lenient": True}  # llguidance ignores keywords that it does not know
_MAPS = ("properties", "patternProperties", "$defs", "definitions")  # schemas by name
_SAME = ("anyOf", "oneOf", "allOf")  # lists of schemas of the very same value
_NESTED = (*_MAPS, *_SAME, "$ref", "prefixItems", "items", "additionalProperties")
_NONE: frozenset[str] = frozenset()


def ready(schema: Json, strict: bool = False) -> Json:
    """A copy whose objects have only the keys that it names, as in xgrammar's strict mode.

    An object with `additionalProperties` keeps it. An object that names no keys stays open, unless
    `strict`. A tuple (prefixItems) has no more items than it names. Regular expressions that
    llguidance cannot read are left out, unless `strict`; then `faults` reports them.

    Raises:
        OpenQwenError: the schema is nested too deep.
    """
    try:
        return _Closer(schema, strict).schema()
    except RecursionError:
        message = "The JSON schema is nested too deep."
        raise OpenQwenError(message, where="sampling, structure") from None


def faults(schema: Json, strict: bool = False) -> list[str]:
    """What llguidance cannot follow in a schema that is `ready`, each with its place.

    Such as "properties.path: Unknown format: path". Unless `strict`, only what it refuses.
    """
    if not (unplaced := _complaints(schema, strict)):
        return []
    placed = []
    for path, node in _nodes(schema):
        flat = {key: value for key, value in node.items() if key not in _NESTED}
        if patterns := _map(node, "patternProperties"):
            flat["patternProperties"] = dict.fromkeys(patterns, True)
        placed += [f"{path}: {words}" if path else words for words in _complaints(flat, strict)]
    return placed or unplaced


def _complaints(schema: Json, strict: bool = False) -> list[str]:
    make = llguidance.LLMatcher
    try:
        grammar = make.grammar_from_json_schema(json.dumps(schema), overrides=LENIENT)
        failed, words = make.validate_grammar_with_warnings(grammar)
    except ValueError as error:
        failed, words = True, [str(error)]
    lines = words if failed or strict else []
    return [" ".join(word for word in line.split() if word.strip("^"))[:200] for line in lines]


class _Closer:
    """Closes the objects of one schema."""

    def __init__(self, root: Json, strict: bool):
        self._root, self._strict = root, strict
        self._open: Json = {}  # definitions left open, as parts of an object that is closed

    def schema(self) -> Json:
        out = self._close(self._root)
        out.pop("x-guidance", None)  # settings of llguidance; clients must not change them
        if self._open:
            out["$defs"] = _map(out, "$defs") | self._open
        return out

    def _close(self, node: Any, part: bool = False) -> Any:
        """A closed copy. part: another schema of the same value decides about other keys."""
        if not isinstance(node, dict):
            return node
        # An object whose keys are named in several schemas is closed here, and not in those.
        sources = sum(key in node for key in ("properties", "anyOf", "oneOf", "$ref"))
        sources += len(_list(node, "allOf"))
        mixed = not part and sources > 1
        out = _mapped(node, lambda key, _, one: self._close(one, (part or mixed) and key in _SAME))
        if (part or mixed) and (reference := _reference(node)):
            out["$ref"] = self._opened(reference)
        for key in () if self._strict else _unreadable(node):
            del out[key]
        if "prefixItems" in out or isinstance(out.get("items"), list):
            out.setdefault("items" if "prefixItems" in out else "additionalItems", False)
        places = list(_places(node, self._root)) if mixed else [node]
        dropped = "patternProperties" in node and "patternProperties" not in out
        if not part and not dropped and not any(map(_decides_other_keys, places)):
            for key in _MAPS[:2] if mixed else ():
                if names := {name: True for one in places for name in _map(one, key)}:
                    out[key] = names | _map(out, key)
            named = out.get("properties")
            if isinstance(named, dict) and "patternProperties" not in out and not self._strict:
                # Keys that are required but not described.
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
        """A reference to the same definition, left open. A definition may refer to itself."""
        name = f"open-{hashlib.sha256(reference.encode()).hexdigest()[:16]}"
        if reference.startswith("#/$defs/open-"):  # of a schema that was made ready before
            name = reference.removeprefix("#/$defs/")
        target = _target(reference, self._root)
        if target is None:
            return reference
        if name not in self._open:
            self._open[name] = True
            self._open[name] = self._close(target, part=True)
        return f"#/$defs/{name}"


def _decides_other_keys(node: Json) -> bool:
    """Whether a schema itself says which keys there may be besides those that it names."""
    return "additionalProperties" in node or bool(node.get("unevaluatedProperties", False))


def _unreadable(node: Json) -> list[str]:
    """Keywords whose regular expressions llguidance cannot read."""
    unreadable: list[str] = []
    for key in ("pattern", "patternProperties"):
        value = dict.fromkeys(_map(node, key), True) or node.get(key)
        if key in node and _complaints({key: value}):
            unreadable.append(key)
    return unreadable


def _mapped(node: Json, change: Callable[[str, str, Any], Any]) -> Json:
    """A copy whose direct sub-schemas are replaced by change(keyword, place, sub-schema)."""
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
    """The schema and all its sub-schemas, with their places."""
    if not isinstance(node, dict):
        return []
    nodes = [(path, node)]
    _mapped(node, lambda _, place, one: nodes.extend(_nodes(one, f"{path}.{place}".lstrip("."))))
    return nodes


def _places(node: Any, root: Json, seen: frozenset[str] = _NONE) -> Iterator[Json]:
    """All schemas of the same value: this one, its alternatives, and those that it refers to."""
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
    """What "#/$defs/name" refers to; None if it does not exist, which llguidance reports."""
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
