import pytest

from openqwen.instruct.synthesize.docstrings import (
    demonstrations_from_docstrings,
    described_functions,
    first_sentence,
    good_sentence,
    module_name,
)
from openqwen.support.generators import Generators

SOURCE = '''
def join(a: str, *paths: str, sep="/") -> str:
    """Join two or more path components, e.g. folders, into one.

    More text follows here.
    """

def _hidden(a):
    """This one is private and should not be found."""

def test_join():
    """This one is a test and should not be found."""

def short():
    """Too short."""

def example(x):
    """Return the double of x. >>> example(2)"""

def silent(): pass

class Stack:
    """A stack of things that grows and shrinks."""

    async def push(self, item):
        """Put an item on top
        of the stack. Return nothing."""

    class Inner:
        def deep(self):
            """This is nested too deep to be found here."""
'''


def document(text, identifier="code/lib/python3.11/posix/paths.py", source="code"):
    return {"id": identifier, "text": text, "source": source, "language": "en", "meta": {}}


def test_public_functions_and_methods_are_found():
    functions = list(described_functions([document(SOURCE)]))
    assert [(f.name, f.sentence) for f in functions] == [
        ("posix.paths.join", "Join two or more path components, e.g. folders, into one."),
        ("posix.paths.Stack.push", "Put an item on top of the stack."),
    ]
    assert functions[0].signature == "def join(a, *paths, sep='/'):"
    assert functions[0].document == "code/lib/python3.11/posix/paths.py"


@pytest.mark.parametrize(
    "text",
    [
        "def broken(:\n  pass",
        "\x00",
        "x = " + "(" * 5000,
        "print 'two'",
        "",
        "def f():\n    '''\\d bad escape'''\n",
    ],
    ids=["syntax", "null", "nested", "python2", "empty", "escape"],
)
def test_unreadable_source_is_passed_over(text):
    assert list(described_functions([document(text)])) == []


def test_only_code_is_read():
    assert list(described_functions([document(SOURCE, source="docs")])) == []


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("One. Two.", "One."),
        ("Same as vs. the other. Next.", "Same as vs. the other."),
        ("See J. Smith for more. End.", "See J. Smith for more."),
        ("Use a.b.c here. End.", "Use a.b.c here."),
        ("Use version 3.11 of it.", "Use version 3.11 of it."),
        ("No end\nin this one\n\nNext paragraph.", "No end in this one"),
        ("", ""),
    ],
)
def test_first_sentence(docstring, sentence):
    assert first_sentence(docstring) == sentence


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("Return the number of items in the queue.", True),
        ("Return `x` as a list of numbers.", True),
        ("Return the naïve number of all the items.", False),
        ("return the number of items in the queue.", False),
        ("Return the number of items in the queue", False),
        ("Return the number of items in the queue...", False),
        ("Too short by far.", False),
        ("Return it. " + "x" * 120 + ".", False),
        ("Return the number (of items in the queue.", False),
        ("Return the `number of items in the queue.", False),
        (":param x: The number of items in the queue.", False),
        ("Return >>> the number of items in the queue.", False),
        ("Word-and-one-more-that-is-very-long end.", False),
        ("Get 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15.", False),
    ],
)
def test_quality_gate(text, good):
    assert good_sentence(text) is good


@pytest.mark.parametrize(
    ("identifier", "module"),
    [
        ("/usr/lib/python3.11/json/tool.py", ["json", "tool"]),
        ("lib/python3.11/site-packages/numpy/linalg/linalg.py", ["linalg", "linalg"]),
        ("code/lib/python3.11/json/__init__.py", ["json"]),
        ("os.py", ["os"]),
        ("some-id-17", []),
        ("lib/python3.11/my-dir/tool.py", []),
    ],
)
def test_module_name(identifier, module):
    assert module_name(identifier) == module


def test_demonstrations_are_deduplicated_and_traceable():
    twice = [document(SOURCE), document(SOURCE, "other.py")]
    records = list(demonstrations_from_docstrings(twice, Generators(3)["d"], 3))
    assert len(records) == 2
    for record in records:
        assert [m["role"] for m in record["messages"]] == ["user", "assistant"]
        assert record["origin"]["method"] == "repurpose"
        assert record["origin"]["parents"] == ["code/lib/python3.11/posix/paths.py"]
        assert (
            "join" in record["messages"][0]["content"] or "push" in record["messages"][0]["content"]
        )
    assert records == list(demonstrations_from_docstrings(twice, Generators(3)["d"], 3))
