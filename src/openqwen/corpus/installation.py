"""The corpus that every user has: the running Python's own installation.

Three sources. "code": the standard library's source, its tests included. "docs": the docstrings of each of its modules,
set out as a reference page, the `pydoc` topics, and the text files among the sources. "metadata": the descriptions of
installed distributions. Real English and real code with real dirt: licence headers, tables of data, near-duplicates.
"""

import ast
import email
import importlib.metadata
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterator
from email.message import Message
from pathlib import Path

from openqwen.corpus.read import Document, FolderReader, html_text

_SITE = frozenset({"site-packages", "dist-packages"})
_FENCE = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)[^\n]*$)", re.MULTILINE | re.DOTALL)
_BADGE = re.compile(
    r"\[!\[[^\]]*\]\([^)]*\)\]\([^)]*\)|!\[[^\]]*\]\([^)]*\)|^\.\. \|?[^\n]*image::[^\n]*\n(?:[ \t]+:[^\n]*\n)*", re.M
)
_TAG = re.compile(
    r"<!--.*?-->|</?(?:a|b|br|center|details|div|em|h[1-6]|hr|i|img|kbd|li|ol|p|picture|pre|source|span|strong|sub|summary"
    r"|sup|table|tbody|td|th|thead|tr|ul|video)\b[^<>]*>",
    re.DOTALL | re.IGNORECASE,
)


class InstallationReader:
    """Iterates over the documents of this Python installation; `skips`, `files` and `bytes` as in `FolderReader`."""

    def __init__(self, max_bytes: int):
        self._library = FolderReader(Path(sysconfig.get_path("stdlib")), max_bytes, exclude=_SITE)
        self.skips = self._library.skips
        self.files = 0
        self.bytes = 0

    def __iter__(self) -> Iterator[Document]:
        for document in self._library:
            path = document["id"]
            code = document["meta"]["profile"] == "code"
            # A module's source and its reference page share a group, so that both are held out or neither is.
            document |= {"id": f"python/{path}", "source": "code" if code else "docs", "language": "en"}
            document["meta"]["group"] = f"python/{path}"
            yield document
            if path.endswith(".py") and not _is_test(path):
                yield from _reference(path, document["text"])
        self.files, self.bytes = self._library.files, self._library.bytes
        yield from _topics()
        yield from self._metadata()

    def _metadata(self) -> Iterator[Document]:
        found: dict[str, Message] = {}
        for distribution in importlib.metadata.distributions():
            try:
                message = email.message_from_string(distribution.read_text("METADATA") or "")
            except UnicodeDecodeError as error:
                self.skips.add("invalid UTF-8", "metadata", why=str(error))
                continue
            name = str(message["Name"] or "").lower()
            if name and name != "openqwen":
                found.setdefault(name, message)
        for name, message in sorted(found.items()):
            description = str(message.get_payload() or message["Description"] or "")
            self.files += 1
            self.bytes += len(description.encode("utf-8"))
            if description.strip():
                title = f"{message['Name']}: {message['Summary'] or ''}".rstrip(": ")
                yield _page(f"metadata/{name}", f"{title}\n\n{_plain(description)}", "metadata")
            else:
                self.skips.add("empty", f"metadata/{name}", why="a distribution without a description")


def _page(identity: str, text: str, source: str, group: str | None = None) -> Document:
    meta = {"profile": "text", "group": group or identity}
    return {"id": identity, "text": text, "source": source, "language": "en", "meta": meta}


def _is_test(path: str) -> bool:
    return any(part in {"test", "tests", "idle_test"} for part in path.split("/")[:-1])


def _topics() -> Iterator[Document]:
    """The language reference as `help("topic")` shows it."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions cut it out
        return
    for name in sorted(topics):
        yield _page(f"pydoc/{name}", topics[name], "docs")


def _reference(path: str, source: str) -> Iterator[Document]:
    """One page for a module: its docstring, then each class and function with its signature and docstring."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    introduction = ast.get_docstring(tree) or ""
    entries = list(_entries(tree, ""))
    if entries or introduction:
        title = "" if introduction.startswith(module) else module
        page = "\n\n".join(filter(None, [title, introduction, *entries]))
        yield _page(f"docs/{module}", page, "docs", group=f"python/{path}")


def _entries(node: ast.AST, prefix: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        docstring = ast.get_docstring(child)
        if docstring:
            arguments = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
            kind = "class " if isinstance(child, ast.ClassDef) else ""
            yield f"{kind}{prefix}{child.name}{arguments}\n{inspect.cleandoc(docstring)}"
        if isinstance(child, ast.ClassDef):
            yield from _entries(child, f"{prefix}{child.name}.")


def _plain(description: str) -> str:
    """A README without what only a browser shows: badges, pictures and HTML tags (outside fenced code)."""
    if re.match(r"\s*<(?:!doctype|html)\b", description, re.IGNORECASE):
        return html_text(description)
    parts = _FENCE.split(description)
    for index in range(0, len(parts), 2):
        parts[index] = _TAG.sub("", _BADGE.sub("", parts[index]))
    return "".join(parts)
