"""Settings of the annotation site (flags of `openqwen annotate`) and of a project (its file)."""

import secrets
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from openqwen.http.settings import ListenConfig
from openqwen.support.command import command
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import write_text
from openqwen.support.settings import Quantization, Settings, validate

PROJECT_FILE = "project.yaml"
DATABASE_FILE = "annotations.db"
LEVELS = 10  # priorities are 0 to 9
_NAME = r"^[A-Za-z0-9_-]{1,40}$"
_TEMPLATE = """\
# An annotation project of OpenQwen. Changes count from the next start of `openqwen annotate`.
id: {id}                     # never change it: sessions and exports name it
title: {title}
language: en                 # of the page at first: en or zh
overlap: 2                   # people who answer each task that is added from now on
ties: true                   # responses may share a rank
best: null                   # a number: only the best so many must be ranked
demonstrations: optional     # off, optional, or required
gold_share: 0.1              # share of tasks with a known answer, once there are any
criteria:                    # scores for each response
  - {{id: helpful, name: Helpful, low: 1, high: 5}}
  - {{id: correct, name: Correct, low: 1, high: 5}}
flags:                       # marks for a response
  - {{id: unsafe, name: Unsafe}}
  - {{id: wrong_language, name: Wrong language}}
minimum: {{}}                  # {{helpful: 4}}: mean scores that a demonstration needs
barred: [unsafe]             # flags that keep a response out of the demonstrations
guidelines: |
  Read the instruction. Rank the responses from best to worst.
  Responses that are equally good share a rank.
"""


class AnnotateConfig(ListenConfig):
    """The defaults are safe: loopback only, accounts by invitation, a limit on everything."""

    port: int = Field(8200, ge=0, le=65535, description="port to listen on; 0: any free port")
    name: list[str] = Field(
        [], description="names by which browsers reach the site beyond loopback, without the port"
    )
    https: bool = Field(
        False, description="browsers reach the site over HTTPS, by a proxy: cookies are secure"
    )
    database: str | None = Field(
        None,
        description="a PostgreSQL URL, better given in OPENQWEN_DATABASE if it holds a password; "
        "default: an SQLite file in the project's folder",
    )
    import_: list[Path] = Field([], description="files of tasks to add before the site starts")
    export: Path | None = Field(
        None, description="folder to write demonstrations and preferences to; the site is not run"
    )
    judge: str | None = Field(
        None,
        description="a model that answers as one more annotator; the site is not run: a folder, a "
        ".gguf file, a hub id, or URL#MODEL of a server with OpenAI's API",
    )
    judge_quantize: Quantization | None = Field(
        None, description="quantise the judge's weights when they are loaded"
    )
    judge_tasks: int = Field(100, ge=1, description="most tasks that the judge answers")
    max_body: int = Field(64 << 20, gt=0, description="largest file to import, in bytes")


class Criterion(Settings):
    """Something that each response is scored on."""

    id: str = Field(pattern=_NAME, description="short name in exports")
    name: str = Field("", max_length=100, description="name on the page")
    description: str = Field("", max_length=2_000, description="what it means")
    low: int = Field(1, description="lowest score")
    high: int = Field(5, description="highest score")


class ResponseFlag(Settings):
    """A mark that a response can get."""

    id: str = Field(pattern=_NAME, description="short name in exports")
    name: str = Field("", max_length=100, description="name on the page")


class ProjectConfig(Settings):
    """A project: what annotators see and how work is shared."""

    id: str = Field(pattern=_NAME, description="random name of the project")
    title: str = Field("Annotation", max_length=200, description="title on the page")
    language: Literal["en", "zh"] = Field("en", description="language of the page at first")
    guidelines: str = Field("", max_length=200_000, description="Markdown beside the work")
    overlap: int = Field(2, ge=1, le=100, description="people who answer each task")
    ties: bool = Field(True, description="responses may share a rank")
    best: int | None = Field(None, ge=1, description="only the best so many must be ranked")
    demonstrations: Literal["off", "optional", "required"] = Field(
        "optional", description="whether people edit the best response into a demonstration"
    )
    criteria: list[Criterion] = Field([], max_length=20, description="scores for each response")
    flags: list[ResponseFlag] = Field([], max_length=20, description="marks for a response")
    minimum: dict[str, float] = Field({}, description="mean scores that a demonstration needs")
    barred: list[str] = Field([], description="flags that no demonstration may have")
    gold_share: float = Field(0.1, ge=0, le=0.5, description="share of tasks with a known answer")
    reveal: bool = Field(False, description="show the models' names after an answer")
    lease_minutes: float = Field(30, gt=0, le=1440, description="time to answer a task")
    session_hours: float = Field(168, gt=0, description="time until people must log in again")
    seed: int = Field(0, description="seed of the order shown and of the places of gold tasks")

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        for kind, names in (("criteria", self.criteria), ("flags", self.flags)):
            ids = [entry.id for entry in names]
            if len(set(ids)) < len(ids):
                raise ValueError(f"two {kind} have the same id")
        if unknown := self.minimum.keys() - {criterion.id for criterion in self.criteria}:
            raise ValueError(f"minimum names no criterion: {', '.join(sorted(unknown))}")
        if unknown := set(self.barred) - {flag.id for flag in self.flags}:
            raise ValueError(f"barred names no flag: {', '.join(sorted(unknown))}")
        if wrong := [entry.id for entry in self.criteria if entry.low >= entry.high]:
            raise ValueError(f"low must be below high in: {', '.join(wrong)}")
        return self

    @property
    def lease(self) -> float:
        """Seconds of a lease."""
        return 60 * self.lease_minutes

    def shown(self) -> dict[str, Any]:
        """What every member of the project may see."""
        fields = ("id", "title", "language", "guidelines", "ties", "best", "demonstrations")
        return self.model_dump(include={*fields, "criteria", "flags", "reveal"})


def open_project(folder: Path) -> ProjectConfig:
    """The project in a folder; a new or empty folder becomes a project.

    Raises:
        OpenQwenError: the folder holds something else, or its project file is wrong.
    """
    path = folder / PROJECT_FILE
    if not path.exists():
        if folder.exists() and not folder.is_dir():
            raise OpenQwenError("This is a file.", folder, "give the folder of a project")
        if folder.exists() and any(folder.iterdir()):
            what = "This folder is not empty and holds no annotation project."
            raise OpenQwenError(what, folder, f"give a new one: {command('annotate', 'PROJECT')}")
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        title = yaml.safe_dump(folder.resolve().name, allow_unicode=True).splitlines()[0]
        write_text(path, _TEMPLATE.format(id=secrets.token_hex(6), title=title))
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OpenQwenError(f"This file cannot be read: {error}", path) from None
    if not isinstance(given, dict):
        raise OpenQwenError("This file holds no settings.", path, "write `title: ...` and so on")
    return validate(ProjectConfig, given, path)
