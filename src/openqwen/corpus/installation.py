"""The corpus that every user has: the running Python's standard library.

Nothing that was installed beside it is read, so the same Python gives the same text everywhere.
There are two sources. "code": the library's source with its tests. "docs": a reference page of each
module, made of its docstrings; the `pydoc` topics; the text files among the sources.
It is real English and real code with real faults: licence headers, data tables, near-duplicates.
"""

import ast
import inspect
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from openqwen.corpus.documents import Document
from openqwen.corpus.read import FolderReader

_TOPICS = "pydoc topics"
_ARCHIVES = (".zip", ".gz", ".zst")
_SITE = frozenset({"site-packages", "dist-packages"})
# Python's list of its modules, and the tests, which the list leaves out. Other files in the folder
# belong to the distribution or the user.
_LIBRARY = sys.stdlib_module_names | {"test"}


class InstallationReader(FolderReader):
    """Iterates over the documents of this Python's library."""

    def __init__(self, max_bytes: int):
        folder = Path(sysconfig.get_path("stdlib"))
        # The library's files in other encodings are there to test how they are refused.
        super().__init__(folder, max_bytes, exclude=_SITE, repair=False)

    def listing(self) -> list[tuple[Path, str]]:
        """The library's files; the last entry stands for the topics."""
        files = [f for f in super().listing() if f[1].split("/")[0].removesuffix(".py") in _LIBRARY]
        return [*files, (self.folder / _TOPICS, _TOPICS)]

    def documents(self, path: Path, name: str) -> Iterator[Document]:
        """The documents of a file and, of a module, its reference page."""
        if name == _TOPICS:
            yield from _topics()
        elif path.suffix in _ARCHIVES:  # data of tests, some of it broken on purpose
            self.skips.add("unknown file type", name, why=f"no reader for {path.suffix}")
        else:
            yield from self._documents(path, name)

    def _documents(self, file: Path, path: str) -> Iterator[Document]:
        for document in self.read(file, path):
            path = document["id"]
            code = document["meta"]["profile"] == "code"
            document |= {"id": f"python/{path}", "source": "code" if code else "docs"}
            document["language"] = "en"
            # A module's source and its reference page share a group, so that both are held out or
            # neither is.
            document["meta"]["group"] = f"python/{path}"
            yield document
            if path.endswith(".py") and not _is_test(path):
                yield from _reference(path, document["text"])


def _page(identity: str, text: str, source: str, group: str | None = None) -> Document:
    meta = {"profile": "text", "group": group or identity}
    return {"id": identity, "text": text, "source": source, "language": "en", "meta": meta}


def _is_test(path: str) -> bool:
    return any(part in {"test", "tests", "idle_test"} for part in path.split("/")[:-1])


def _topics() -> Iterator[Document]:
    """The pages of the language reference that `help("topic")` shows."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions cut it out
        return
    for name in sorted(topics):
        yield _page(f"pydoc/{name}", topics[name], "docs")


def _reference(path: str, source: str) -> Iterator[Document]:
    """One page for a module: its docstring, then its classes and functions with signatures."""
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
