"""Tool calls in a stream: any cutting of the text gives the same calls, and arguments are what the
model wrote.
"""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openqwen.serve.tools import CLOSE, OPEN, Arguments, Call, Text, ToolCalls


def read(*chunks, names=()):
    """(text, [(name, arguments)]) of the chunks, and what came in pieces must be in order."""
    machine = ToolCalls(names)
    pieces = [piece for chunk in chunks for piece in machine.push(chunk)] + machine.finish()
    text, calls = "", []
    for piece in pieces:
        if isinstance(piece, Text):
            text += piece.text
        elif isinstance(piece, Call):
            assert piece.index == len(calls)
            calls.append([piece.name, ""])
        elif isinstance(piece, Arguments):
            calls[piece.index][1] += piece.text
    return text, [tuple(call) for call in calls]


def call(name, arguments):
    return f'{OPEN}\n{{"name": {json.dumps(name)}, "arguments": {arguments}}}\n{CLOSE}'


# Pieces of the format and of text that nearly is the format, so that random joins meet every state.
NEARLY = "``` ```json <tools> "
NEARLY += (
    '< <tool _call> </tool { } [ ] " \\ : , name null é 日本 x "g" \\" <tool_call 1.0e3 "name" '
    '"arguments"'
)
PARTS = st.sampled_from(
    [*NEARLY.split(), OPEN, CLOSE, " ", "\n", '{"name": "f", "arguments": {"a": "}"}}']
)
MESSY = st.lists(PARTS, max_size=30).map("".join)


@given(st.one_of(MESSY, st.text()), st.data())
@settings(max_examples=400, deadline=None)
def test_any_cutting_gives_the_same(text, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    for names in ((), ["f", "g"]):
        assert read(*chunks, names=names) == read(text, names=names) == read(*text, names=names)


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(
        st.tuples(st.text(), st.dictionaries(st.text(), VALUES, max_size=4), st.booleans()),
        max_size=4,
    ),
    st.sampled_from([None, 1]),
    st.text(alphabet="ab <\n", max_size=12),
)
@settings(max_examples=300, deadline=None)
def test_calls_come_out_as_they_were_written(calls, indent, before):
    written = [
        (name, json.dumps(arguments, indent=indent, ensure_ascii=ascii_))
        for name, arguments, ascii_ in calls
    ]
    text = before + "\n" + "\n".join(call(*one) for one in written)
    said, found = read(*text)
    assert found == written
    assert said == ((before + "\n").rstrip() if calls else before + "\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no call at all", ("no call at all", [])),
        (f'{OPEN}{{"arguments": {{"a": 1}}, "name": "f"}}{CLOSE}', ("", [("f", '{"a": 1}')])),
        (f'{OPEN}{{"name": "f"}}{CLOSE}', ("", [("f", "{}")])),
        (call("f", "{}") + call("g", "[1, [2]]"), ("", [("f", "{}"), ("g", "[1, [2]]")])),
        (call("f", "{}") + " then words", (" then words", [("f", "{}")])),
        # the closing tag forgotten, and one inside a string
        (
            f'{OPEN}{{"name": "f", "arguments": {{}}}}{OPEN}{{"name": "g"}}',
            ("", [("f", "{}"), ("g", "{}")]),
        ),
        (call("f", '{"a": "</tool_call>"}'), ("", [("f", '{"a": "</tool_call>"}')])),
        # what is no call stays text
        (f"{OPEN} see above {CLOSE}", (f"{OPEN} see above {CLOSE}", [])),
        (f'{OPEN}{{"nom": "f"}}{CLOSE}', (f'{OPEN}{{"nom": "f"}}{CLOSE}', [])),
        (OPEN + call("f", "{}"), (OPEN, [("f", "{}")])),
        # cut off by the end of the answer
        (f'{OPEN}{{"name": "f", "arguments": {{"a": "b', ("", [("f", '{"a": "b')])),
        (f'{OPEN}{{"name": "f', (f'{OPEN}{{"name": "f', [])),
        ("one < two, <tool_", ("one < two, <tool_", [])),
        (f'{OPEN}{{"name": "f\\u00e9\\"", "arguments": {{}}}}{CLOSE}', ("", [('fé"', "{}")])),
    ],
)
def test_examples(text, expected):
    assert read(text) == expected
    assert read(*text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "f", "arguments": {"a": 1}}', ("", [("f", '{"a": 1}')])),
        ('\n{"name": "f"}\n{"name": "g", "arguments": {}}', ("", [("f", "{}"), ("g", "{}")])),
        (call("f", "{}") + '{"name": "g"}', ("", [("f", "{}"), ("g", "{}")])),
        ('{"name": "h", "arguments": {}}', ('{"name": "h", "arguments": {}}', [])),
        ('{"capital": {"name": "f"}}', ('{"capital": {"name": "f"}}', [])),
        ('{"name": 5}', ('{"name": 5}', [])),
        ('{"name": {"f": 1}} {"name": "f"}', ('{"name": {"f": 1}} {"name": "f"}', [])),
        ('So: {"name": "f"}', ('So: {"name": "f"}', [])),
        # in a fence, in other tags, in an array
        ('```json\n{\n  "name": "f",\n  "arguments": {"a": 1}\n}\n```', ("", [("f", '{"a": 1}')])),
        ('```\n{"name": "f"}\n```\n', ("", [("f", "{}")])),
        ('```xml\n{"name": "f"}', ("", [("f", "{}")])),
        (
            '```json\n{"name": "f"}\n```\n\n```json\n{"name": "g"}\n```',
            ("", [("f", "{}"), ("g", "{}")]),
        ),
        (
            '```json\n[{"name": "f", "arguments": {"a": "```"}}, {"name": "g"}]\n```',
            ("", [("f", '{"a": "```"}'), ("g", "{}")]),
        ),
        ('[{"name": "f", "arguments": {"a": [1, 2]}}]', ("", [("f", '{"a": [1, 2]}')])),
        ('<tools>\n{"name": "f"}\n</tools>', ("", [("f", "{}")])),
        ('```json\n<function_call>{"name": "f"}</function_call>\n```', ("", [("f", "{}")])),
        ('{"name": "f"}\n' + call("g", "{}"), ("", [("f", "{}"), ("g", "{}")])),
        (
            call("f", "{}") + '\n{"name": "g"}\n{"name": "g"}',
            ("", [("f", "{}"), ("g", "{}"), ("g", "{}")]),
        ),
        # no whole answer of calls: not a letter is lost
        *(
            (text, (text, []))
            for text in (
                '```json\n{"name": "h", "arguments": {}}\n```',
                '```json\n{"name": "f", "arguments": {}}\n```\nThis calls f.',
                'Like this:\n```json\n{"name": "f", "arguments": {}}\n```',
                "```python\nf()\n```",
                '{"name": "f", "price": 3}',
                '{"name": "f", "arguments": [1]}',
                '[{"name": "f"}, {"name": "h"}]',
                '{"name": "f", "arguments": {"a": 1',
                '{"name": "f", "arguments": ' + '{"a":' * 5000,
                '{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}",
                "```",
                "```json",
                "[1, 2]",
                "<tools> are",
            )
        ),
        ('{"name": "f"} and ' + call("g", "{}"), ('{"name": "f"} and', [("g", "{}")])),
    ],
)
def test_calls_without_tags(text, expected):
    assert read(text, names=["f", "g"]) == expected
    assert read(*text, names=["f", "g"]) == expected


def test_only_what_may_be_a_call_is_held_back():
    for text, held in (
        ("```python", "```"),
        ('```json\n{"city"', '```json\n{"'),
        ('{"name": "h', '{"name": "'),
        ("[1", "["),
    ):
        machine = ToolCalls(["f"])
        assert machine.push(held) == []
        assert machine.push(text.removeprefix(held)) == [Text(text)]
        assert machine.push(" so") == [Text(" so")]


def test_arguments_stream_as_they_come():
    machine = ToolCalls()
    machine.push(f'{OPEN}\n{{"name": "f", "arguments": ')
    assert machine.push('{"city": "Ber') == [Arguments(0, '{"city": "Ber')]
    assert machine.push('lin"}') == [Arguments(0, 'lin"}')]
