"""Data repurposing by a program: docstrings become the answers to questions about their functions.

`synthesize repurpose` lets a model write the instruction to a document (Qwen2 report, section 4.1).
A docstring's can be read from its function: "what does this do", "write its docstring".
"""

import ast
import inspect
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from numpy.random import Generator

SHORTEST, LONGEST = 20, 120  # characters of an answer
_QUESTIONS = (
    "What does `{name}` do?",
    "Describe `{name}` in one sentence.",
    "Write a docstring for: {signature}",
    "What is this function for? {signature}",
)
_LONGEST_SIGNATURE = 72  # characters
_LARGEST_SOURCE = 1_000_000  # characters; larger files are generated tables
_ABBREVIATIONS = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|cf|resp|no)|\b[A-Z])\.$", re.IGNORECASE)
_LIBRARY_ROOT = re.compile(r"^(?:.*/)?(?:site-packages|python\d[\d.]*|lib)/", re.IGNORECASE)

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Described:
    """A public function with the first sentence of its docstring.

    name: dotted, with as many modules as the document's path shows. document: its id.
    """

    name: str
    signature: str
    sentence: str
    document: str


def demonstrations_from_docstrings(
    documents: Iterable[dict[str, Any]], rng: Generator, seed: int
) -> Iterator[dict]:
    """One demonstration a described function; no question and no answer comes twice.

    documents: those with the source "code" are used. rng: chooses each question's form.
    """
    seen: set[str] = set()
    for function in described_functions(documents):
        form = _QUESTIONS[int(rng.integers(len(_QUESTIONS)))]
        question = form.format(name=function.name, signature=function.signature)
        if question in seen or function.sentence.casefold() in seen:
            continue
        seen |= {question, function.sentence.casefold()}
        yield {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": function.sentence},
            ],
            "origin": {
                "method": "repurpose",
                "seed": seed,
                "parents": [function.document],
                "tasks": ["docstring"],
            },
        }


def described_functions(documents: Iterable[dict[str, Any]]) -> Iterator[Described]:
    """Public functions and methods of code documents whose docstring passes the quality gate."""
    for document in documents:
        if document["source"] != "code" or len(document["text"]) > _LARGEST_SOURCE:
            continue
        module = module_name(document["id"])
        for path, node in _public_functions(_parse(document["text"])):
            sentence = first_sentence(ast.get_docstring(node, clean=False) or "")
            signature = _signature(node)
            if good_sentence(sentence) and len(signature) <= _LONGEST_SIGNATURE:
                yield Described(".".join([*module, *path]), signature, sentence, document["id"])


def module_name(identifier: str) -> list[str]:
    """The last two parts of a path's module: `…/lib/python3.11/json/tool.py` → json, tool."""
    path = PurePosixPath(_LIBRARY_ROOT.sub("", identifier))
    if path.suffix != ".py":
        return []
    parts = [part for part in path.with_suffix("").parts if part != "__init__"]
    return parts[-2:] if all(part.isidentifier() for part in parts[-2:]) else []


def _parse(text: str) -> ast.Module:
    """The syntax tree; empty where this interpreter cannot parse the text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module(body=[], type_ignores=[])


def _public_functions(tree: ast.Module) -> Iterator[tuple[list[str], Function]]:
    for node in tree.body:
        if isinstance(node, Function) and _public(node.name):
            yield [node.name], node
        elif isinstance(node, ast.ClassDef) and _public(node.name):
            for inner in node.body:
                if isinstance(inner, Function) and _public(inner.name):
                    yield [node.name, inner.name], inner


def _public(name: str) -> bool:
    return not name.startswith(("_", "test", "Test"))


def _signature(node: Function) -> str:
    """`def name(arguments):` without annotations."""
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"def {node.name}({ast.unparse(node.args)}):"


def first_sentence(docstring: str) -> str:
    """The first sentence of the first paragraph, on one line; without a full stop, all of it."""
    paragraph = inspect.cleandoc(docstring).split("\n\n")[0]
    text = " ".join(paragraph.split())
    for end in re.finditer(r"\.(?=\s|$)", text):
        if not _ABBREVIATIONS.search(text[: end.end()]):
            return text[: end.end()]
    return text


def good_sentence(text: str) -> bool:
    """Whether a text is one plain English sentence of 20 to 120 characters, without markup."""
    return (
        SHORTEST <= len(text) <= LONGEST
        and text.isascii()
        and text[0].isupper()
        and text.endswith(".")
        and not text.endswith("..")
        and len(text.split()) >= 4
        # Doctests, markup and unfinished notes (a docstring that says TODO) make no demonstration.
        and not re.search(r">>>|[:@]param|::|\\|[{}<>|=*_]{2}|TODO|FIXME", text)
        and all(text.count(a) == text.count(b) for a, b in ("()", "[]", "{}"))
        and text.count("`") % 2 == 0
        and text.count('"') % 2 == 0
        and sum(c.isalpha() or c == " " for c in text) >= 0.85 * len(text)
    )
