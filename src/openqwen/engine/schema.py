"""JSON schemas made ready for llguidance: closed where they name their keys, without what it cannot follow."""

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
LENIENT: Json = {"lenient": True}  # llguidance passes over keywords that it does not know
_MAPS = ("properties", "patternProperties", "$defs", "definitions")  # schemas by name
_SAME = ("anyOf", "oneOf", "allOf")  # lists of schemas of the very same value
_NESTED = (*_MAPS, *_SAME, "$ref", "prefixItems", "items", "additionalProperties")
_NONE: frozenset[str] = frozenset()


def ready(schema: Json, strict: bool = False) -> Json:
    """A copy whose objects hold no other keys than the schema names, at every depth, as in xgrammar's strict mode.

    An object keeps what it says itself of other keys (additionalProperties). One that names no keys stays open, unless
    `strict`. A tuple (prefixItems) has no more items than it names. Expressions that llguidance cannot read are left
    out, unless `strict`, where `faults` finds them.

    Raises: OpenQwenError for a schema that is nested too deep.
    """
    try:
        out = _ready(schema, schema, strict)
    except RecursionError:
        raise OpenQwenError("The JSON schema is nested too deep.", where="sampling, structure") from None
    out.pop("x-guidance", None)  # llguidance's own settings, which are not the client's
    return out


def faults(schema: Json, strict: bool = False) -> list[str]:
    """What llguidance cannot follow in a schema that is `ready`, each with its place ("properties.path: Unknown format:
    path"). Without `strict` only what keeps it from reading the schema at all."""
    whole = _complaints(schema, strict)
    found = []
    for path, node in _nodes(schema) if whole else ():
        own = {key: value for key, value in node.items() if key not in _NESTED}
        found += [f"{path}: {words}" if path else words for words in _complaints(own, strict)]
    return found or whole


def _complaints(schema: Json, strict: bool = False) -> list[str]:
    make = llguidance.LLMatcher
    try:
        grammar = make.grammar_from_json_schema(json.dumps(schema), overrides=LENIENT)
        failed, words = make.validate_grammar_with_warnings(grammar)
    except ValueError as error:
        failed, words = True, [str(error)]
    return [" ".join(word.split())[:200] for word in words] if failed or strict else []


def _ready(node: Any, root: Json, strict: bool, within: frozenset[str] | None = None) -> Any:
    """within: where another schema of the same value says which keys there are, the references followed from it."""
    if not isinstance(node, dict):
        return node
    # An object whose keys are named in several places is closed here, and nowhere below.
    sources = sum(key in node for key in ("properties", "anyOf", "oneOf", "$ref")) + len(_list(node, "allOf"))
    mixed = within is None and sources > 1
    inner = _NONE if mixed else within

    def change(key: str, _: str, one: Any) -> Any:
        return _ready(one, root, strict, inner if key in _SAME else None)

    out = _mapped(node, change)
    if inner is not None and (reference := node.get("$ref")) and reference not in inner:
        # What it refers to may be closed where it stands alone.
        part = _ready(_target(reference, root), root, strict, inner | {reference})
        out["allOf"] = [*_list(out, "allOf"), part]
        del out["$ref"]
    places = list(_places(node, root)) if mixed else [node]
    said = any("additionalProperties" in one or one.get("unevaluatedProperties", False) for one in places)
    for key in () if strict else ("pattern", "patternProperties"):
        value = dict.fromkeys(_map(node, key), True) or node.get(key)
        if value is not None and _complaints({key: value}):
            del out[key]
            said |= key == "patternProperties"
    if "prefixItems" in out or isinstance(out.get("items"), list):
        out.setdefault("items" if "prefixItems" in out else "additionalItems", False)
    if within is not None or said:
        return out
    out.pop("unevaluatedProperties", None)
    if mixed:
        named = {key: {n: True for one in places for n in _map(one, key)} for key in _MAPS[:2]}
        out |= {key: names | out.get(key, {}) for key, names in named.items() if names}
    kinds = (node.get("type"), *_list(node, "type"))
    if "properties" in out or "patternProperties" in out or (strict and not sources and "object" in kinds):
        out["additionalProperties"] = False
    return out


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
    """The schemas that speak of the same value as this one: itself, its alternatives and what it refers to."""
    if not isinstance(node, dict):
        return
    yield node
    for key in _SAME:
        for one in _list(node, key):
            yield from _places(one, root, seen)
    if (reference := node.get("$ref")) and reference not in seen:
        yield from _places(_target(reference, root), root, seen | {reference})


def _target(reference: Any, root: Json) -> Any:
    """What "#/$defs/name" refers to; where there is no such thing, the reference itself, for llguidance to refuse."""
    node: Any = root
    try:
        for step in unquote(reference).removeprefix("#").split("/")[1:]:
            key = step.replace("~1", "/").replace("~0", "~")
            node = node[int(key)] if isinstance(node, list) else node[key]
    except (LookupError, TypeError, ValueError):
        return {"$ref": reference}
    return node


def _list(node: Json, key: str) -> list[Any]:
    value = node.get(key)
    return value if isinstance(value, list) else []


def _map(node: Json, key: str) -> Json:
    value = node.get(key)
    return value if isinstance(value, dict) else {}
