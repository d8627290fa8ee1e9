"""JSON schemas made ready: closed objects, annotations passed over, and places named under
`strict`.
"""

import datetime
import enum
import json
import uuid
from contextlib import suppress
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, HttpUrl, SecretStr, create_model
from tiny import tokenizer

from openqwen.engine import Structure
from openqwen.engine.constrain import Structures
from openqwen.engine.schema import faults, ready
from openqwen.support.errors import OpenQwenError

pytest.importorskip("llguidance")
WORDS = tokenizer()
STRUCTURES = Structures(WORDS, [WORDS.eos_id])


def fits(schema, text):
    """Whether this is a whole answer to the schema."""
    matcher = STRUCTURES.matcher(Structure("json_schema", json.dumps(schema)))
    ids = WORDS.encode(text)
    if len(matcher.fitting(ids)) < len(ids):
        return False
    for token in ids:
        matcher.accept(token)
    return matcher.complete or bool(matcher.masks([], WORDS.vocab_size)[0][WORDS.eos_id])


A = {"type": "object", "properties": {"a": {"type": "integer"}}}
B = {"type": "object", "properties": {"b": {"type": "integer"}}}
OPEN = A | {"additionalProperties": True}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (A, '{"a":1}', '{"a":1,"x":2}'),
        (A, "{}", '{"x":2}'),
        ({"properties": A["properties"]}, '{"a":1}', "5"),
        ({"type": "array", "items": A}, '[{"a":1},{}]', '[{"x":1}]'),
        ({"anyOf": [A, {"type": "null"}]}, '{"a":1}', '{"x":1}'),
        ({"oneOf": [A, B]}, '{"b":1}', '{"x":1}'),
        ({"properties": {"p": A}}, '{"p":{"a":1}}', '{"p":{"x":1}}'),
        ({"additionalProperties": A}, '{"p":{"a":1}}', '{"p":{"x":1}}'),
        ({"$ref": "#/$defs/A", "$defs": {"A": A}}, '{"a":1}', '{"x":1}'),
        ({"$ref": "#/definitions/A", "definitions": {"A": A}}, '{"a":1}', '{"x":1}'),
        (
            {"patternProperties": {"^a+$": {"type": "integer"}}, "type": "object"},
            '{"aa":1}',
            '{"x":1}',
        ),
        # keys named in several places
        ({"allOf": [A, B]}, '{"a":1,"b":2}', '{"a":1,"x":2}'),
        (
            {"allOf": [{"$ref": "#/$defs/A"}, B], "$defs": {"A": A}},
            '{"a":1,"b":2}',
            '{"a":1,"x":2}',
        ),
        (A | {"$ref": "#/$defs/B", "$defs": {"B": B}}, '{"a":1,"b":2}', '{"a":1,"x":2}'),
        (A | {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}, '{"a":1}', "{}"),
        (
            {
                "$ref": "#/$defs/T",
                "$defs": {"T": {"allOf": [A, {"properties": {"t": {"$ref": "#/$defs/T"}}}]}},
            },
            '{"a":1,"t":{"a":2}}',
            '{"a":1,"t":{"x":2}}',
        ),
        ({"allOf": [A, B], "unevaluatedProperties": False}, '{"a":1,"b":2}', '{"a":1,"x":2}'),
        # tuples, of two drafts
        ({"type": "array", "prefixItems": [A, B]}, '[{"a":1},{"b":1}]', "[{},{},{}]"),
        ({"type": "array", "items": [A, B]}, '[{"a":1},{"b":1}]', "[{},{},{}]"),
    ],
)
def test_objects_hold_the_keys_that_are_named(schema, good, bad):
    assert fits(schema, good)
    assert not fits(schema, bad)
    assert faults(ready(schema)) == []
    assert ready(ready(schema)) == ready(schema)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (OPEN, '{"a":1,"x":2}'),
        ({"type": "object"}, '{"x":{"y":2}}'),
        (A | {"additionalProperties": {"type": "string"}}, '{"a":1,"x":"2"}'),
        (A | {"unevaluatedProperties": True}, '{"a":1,"x":2}'),
        ({"allOf": [A, OPEN]}, '{"a":1,"x":2}'),
        ({"properties": {"p": OPEN}}, '{"p":{"x":1}}'),
        ({"type": "array", "prefixItems": [A], "items": B}, '[{},{"b":1},{}]'),
        # a key that is required and described nowhere
        (A | {"required": ["x"]}, '{"a":1,"x":2}'),
        ({"allOf": [A, {"required": ["x"]}]}, '{"a":1,"x":2}'),
        # a property with a keyword's name, and data that look like a schema
        ({"properties": {"properties": {"type": "integer"}}}, '{"properties":1}'),
        ({"const": {"properties": {}}}, '{"properties":{}}'),
    ],
)
def test_what_a_schema_says_itself_counts(schema, text):
    assert fits(schema, text)


def test_strict_objects_that_name_no_keys_are_empty():
    schema = {"properties": {"p": {"type": "object"}, "q": {"type": ["object", "null"]}, "r": OPEN}}
    closed = ready(schema, strict=True)
    assert fits(closed, '{"p":{},"q":null,"r":{"x":1}}')
    assert not fits(closed, '{"p":{"x":1}}')
    assert not fits(closed, '{"q":{"x":1}}')


UNKNOWN = [
    ({"type": "string", "format": "path"}, "path"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"not": {"type": "string"}}, "not"),
    ({"if": {"type": "string"}, "then": {"maxLength": 3}, "else": {}}, "if"),
    ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
    ({"type": "array", "contains": {"type": "string"}}, "contains"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"type": "object", "dependencies": {"a": ["b"]}}, "dependencies"),
    ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    ({"type": "string", "pattern": "^(?!a)"}, "look-ahead"),
    ({"type": "object", "patternProperties": {"^a": {}, "a$": {}}}, "not disjoint"),
]


@pytest.mark.parametrize(("inner", "word"), UNKNOWN)
def test_what_cannot_be_followed_is_passed_over_unless_strict(inner, word):
    for schema, place in (
        ({"properties": {"p": inner}}, "properties.p: "),
        ({"$defs": {"P": inner}, "properties": {"p": {"$ref": "#/$defs/P"}}}, "$defs.P: "),
        ({"properties": {"p": {"anyOf": [{"type": "null"}, inner]}}}, "properties.p.anyOf[1]: "),
        ({"type": "array", "items": inner}, "items: "),
    ):
        assert faults(ready(schema)) == []
        assert STRUCTURES.matcher(Structure("json_schema", json.dumps(schema)))
        (fault,) = faults(ready(schema, strict=True), strict=True)
        assert fault.startswith(place)
        assert word in fault


def test_a_schema_of_no_use_is_refused_with_its_place():
    for schema, place in (
        ({"properties": {"p": {"type": "hiccup"}}}, "properties.p: Invalid type: hiccup"),
        ({"properties": {"p": {"$ref": "#/$defs/Q"}}}, "Pointer '/$defs/Q' does not exist"),
        ({"allOf": [A, {"$ref": "#/$defs/Q"}]}, "Pointer '/$defs/Q' does not exist"),
        ({"type": "array", "items": {"enum": []}, "minItems": 1}, "items: Unsatisfiable"),
    ):
        (fault,) = faults(ready(schema))
        assert fault.startswith(place)


KEYWORDS = (
    "type properties allOf anyOf $ref items prefixItems pattern patternProperties "
    "additionalProperties $defs"
)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.sampled_from(["object", "#", "#/$defs/a", "(", "a", "array"])
)
JUNK = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([*KEYWORDS.split(), "a"]), inner)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(KEYWORDS.split()), JUNK), st.booleans())
@settings(max_examples=200, deadline=None)
def test_no_schema_is_a_fault_of_ours(schema, strict):
    assert isinstance(faults(ready(schema, strict), strict), list)
    with suppress(OpenQwenError):
        STRUCTURES.matcher(Structure("json_schema", json.dumps(schema)))


def test_a_schema_nested_too_deep_is_refused():
    schema: dict = {"type": "integer"}
    for _ in range(900):
        schema = {"items": schema}
    with pytest.raises(OpenQwenError, match="nested too deep"):
        ready(schema)


class Colour(enum.Enum):
    RED = "red"


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, Field(ge=1, le=9)]


class Dog(BaseModel):
    kind: Literal["dog"]
    good: bool


class Node(BaseModel):
    value: int
    children: list["Node"] = []


FIELDS = {  # a type, and values of it
    "time": (datetime.datetime, "2024-05-06T07:08:09Z"),
    "date": (datetime.date, "2024-05-06"),
    "span": (datetime.timedelta, "P1DT2H"),
    "uuid": (uuid.UUID, "12345678-1234-4234-8234-123456789abc"),
    "decimal": (Decimal, "1.50"),
    "set": (set[int], [1, 2]),
    "tuple": (tuple[int, str], [1, "a"]),
    "literal": (Literal["a", 1, None], None),
    "enum": (Colour, "red"),
    "constrained": (Annotated[int, Field(ge=2, le=8, multiple_of=2)], 4),
    "pattern": (Annotated[str, Field(pattern="^[a-z]+$", max_length=4)], "abcd"),
    "recursive": (Node, {"value": 1, "children": [{"value": 2, "children": []}]}),
    "optional": (Cat | None, {"kind": "cat", "lives": 9}),
    "union": (int | str | Dog, {"kind": "dog", "good": True}),
    "discriminated": (
        Annotated[Cat | Dog, Field(discriminator="kind")],
        {"kind": "dog", "good": False},
    ),
    "path": (Path, "/tmp/a"),
    "secret": (SecretStr, "x"),
    "bytes": (bytes, "x"),
    "url": (HttpUrl, "https://example.org/"),
    "mapping": (dict[str, int], {"a": 1}),
    "named": (dict[Colour, int], {"red": 1}),
    "any": (dict[str, Any], {"a": [1, None]}),
}


@pytest.mark.parametrize("name", FIELDS)
def test_types_of_pydantic(name):
    kind, value = FIELDS[name]
    model = create_model("Model", field=(kind, ...))
    text = json.dumps({"field": value}, separators=(",", ":"))
    model.model_validate_json(text)
    schema = model.model_json_schema()
    assert faults(ready(schema)) == []
    assert fits(schema, text)
    assert not fits(schema, text[:-1] + ',"invented":1}')
