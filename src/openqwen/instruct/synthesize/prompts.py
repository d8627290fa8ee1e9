"""The prompts of a method: Jinja files, in English and Chinese, that a user can read and replace.

A file NAME.LANGUAGE.jinja is the text of the user's message. Where its first line is
`=== system`, the text up to the line `=== user` is that of a system message.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from openqwen.support.errors import OpenQwenError, suggestion

SHIPPED = Path(__file__).with_name("prompts")
_LONGEST = 2_000_000  # characters of a rendered prompt
_ENDING = ".jinja"
_SYSTEM, _USER = "=== system\n", "\n=== user\n"
# Prompts may come from somebody else: they run in Jinja's sandbox and see the given values alone.
_ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, autoescape=False
)


class PromptFiles:
    """The prompt files of one method: those that are shipped, and a user's in place of them.

    Args:
        method: the folder of shipped files.
        folder: a user's files; each has the name of a shipped one.

    Raises:
        OpenQwenError: a file has no shipped namesake, or is no template.
    """

    def __init__(self, method: str, folder: Path | None = None):
        self.paths = {p.name.removesuffix(_ENDING): p for p in _files(SHIPPED / method)}
        for path in _files(folder) if folder else ():
            name = path.name.removesuffix(_ENDING)
            if name not in self.paths:
                what = f"The method '{method}' has no prompt '{name}'."
                what += suggestion(name, self.paths)
                raise OpenQwenError(what, path, f"use these names: {', '.join(self.paths)}")
            self.paths[name] = path
        sources = {name: path.read_text(encoding="utf-8") for name, path in self.paths.items()}
        self.digests = {n: hashlib.sha256(s.encode()).hexdigest()[:12] for n, s in sources.items()}
        self._parts = {name: self._compiled(name, source) for name, source in sources.items()}

    def messages(
        self, name: str, language: str, values: Mapping[str, Any]
    ) -> tuple[str, list[dict[str, str]]]:
        """Render a prompt: (the file's name, chat messages).

        A language without a file of its own gets the English one.
        """
        chosen = f"{name}.{language}"
        if chosen not in self._parts:
            chosen = f"{name}.en"
        try:
            texts = {role: part.render(values) for role, part in self._parts[chosen].items()}
        except (TemplateError, OverflowError, TypeError, ValueError) as error:
            what = f"This prompt cannot be rendered: {error}."
            raise OpenQwenError(what, self.paths[chosen], "correct the template") from None
        for text in texts.values():
            if len(text) > _LONGEST:
                what = f"A prompt has more than {_LONGEST:,} characters."
                raise OpenQwenError(what, self.paths[chosen], "give shorter input")
        return chosen, [{"role": role, "content": text.strip()} for role, text in texts.items()]

    def _compiled(self, name: str, source: str) -> dict[str, Template]:
        system, user = "", source
        if source.startswith(_SYSTEM) and _USER in source:
            system, _, user = source.removeprefix(_SYSTEM).partition(_USER)
        try:
            parts = {"user": _ENVIRONMENT.from_string(user)}
            return {"system": _ENVIRONMENT.from_string(system)} | parts if system else parts
        except TemplateError as error:
            where = f"{self.paths[name]}:{getattr(error, 'lineno', 1)}"
            raise OpenQwenError(f"This is no template: {error}.", where) from None


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.name.endswith(_ENDING))
    except OSError as error:
        what = f"The prompts cannot be read: {error.strerror}."
        raise OpenQwenError(what, folder, "give a folder with .jinja files") from None
