"""Where a model is: a path, or the id of a repository on the Hugging Face hub, fetched once and
kept in its cache.

Data sets of the hub are found in the same way, under `hub:owner/name[@revision][:split]`.
"""

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from openqwen.support.errors import OpenQwenError, suggestion

_ID = re.compile(r"(?P<repository>[\w][\w.-]*/[\w][\w.-]*)(@(?P<revision>[\w./-]+))?")
_FILES = [
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
]

HUB = "hub:"
DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".parquet")
_DATA_FILES = ["README.md", *(f"*{suffix}" for suffix in DATA_SUFFIXES)]
# The words by which `datasets` knows the splits of files that the card does not name.
_SPLITS = {"train": {"train", "training"}, "test": {"test", "testing", "eval", "evaluation"}}
_SPLITS |= {"validation": {"validation", "valid", "dev", "val"}}
_SHARD = re.compile(r"data/(\w+)-\d{5}-of-\d{5}")


def local(source: str | Path) -> Path:
    """The path of a model. `owner/name` or `owner/name@revision` that is no path is fetched from
    the hub.

    The environment decides as in all software that uses the hub: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE.
    Raises OpenQwenError where the repository cannot be had.
    """
    match = _ID.fullmatch(str(source))
    if match is None or Path(source).exists():
        return Path(source)
    return _fetched(match["repository"], match["revision"], "model", _FILES)


def dataset_files(source: str) -> list[Path]:
    """The files of a split of `hub:owner/name[@revision][:split]`, in order; split: train, if not
    told.

    The card (README.md) says which files are of the split; else their names do, as for `datasets`.
    Raises OpenQwenError where the data set cannot be had or holds no such split.
    """
    folder, repository, split = _dataset(source)
    splits = _splits(folder, source)
    if found := splits.get(split):
        return found
    near = suggestion(split, splits)
    do = (
        f"give {HUB}{repository}:SPLIT"
        if splits
        else f"give a data set of {', '.join(DATA_SUFFIXES)} files"
    )
    raise OpenQwenError(
        f"There is no split '{split}', only: {', '.join(splits) or 'none'}.{near}", source, do
    )


def pinned(source: str) -> str:
    """The same data set at the commit that is its revision now, so that later reads give the same
    records.
    """
    folder, repository, split = _dataset(source)
    return f"{HUB}{repository}@{folder.name}:{split}"


def _dataset(source: str) -> tuple[Path, str, str]:
    """The folder of a data set's commit, its repository, and the split that is asked for."""
    named, _, split = source.removeprefix(HUB).partition(":")
    if (match := _ID.fullmatch(named)) is None:
        raise OpenQwenError("This names no data set.", source, f"write {HUB}owner/name:split")
    folder = _fetched(match["repository"], match["revision"], "dataset", _DATA_FILES)
    return folder, match["repository"], split or "train"


def _splits(folder: Path, source: str) -> dict[str, list[Path]]:
    """Files by split: as the card says, else by words in their paths; without any, `train`."""
    paths = sorted(path for path in folder.rglob("*") if path.name.endswith(DATA_SUFFIXES))
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    if patterns := _of_card(folder / "README.md", source):
        return {
            split: [
                path
                for name, path in names.items()
                if any(fnmatch(name, pattern) for pattern in of_split)
            ]
            for split, of_split in patterns.items()
        }
    found: dict[str, list[Path]] = {}
    for name, path in names.items():
        words = set(re.split(r"[^a-zA-Z]+", name))
        if shard := _SHARD.search(name):
            found.setdefault(shard[1], []).append(path)
        elif split := next((split for split, known in _SPLITS.items() if words & known), None):
            found.setdefault(split, []).append(path)
    return found or ({"train": paths} if paths else {})


def _of_card(card: Path, source: str) -> dict[str, list[str]]:
    """Patterns of file names by split, of the card's only or default configuration, if any."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    head = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        configs = (
            [c for c in yaml.safe_load(head[1])["configs"] if "data_files" in c] if head else []
        )
        default = [
            c for c in configs if c.get("default") or c["config_name"] == "default"
        ] or configs
        found = [(c["config_name"], _patterns(c["data_files"])) for c in default]
    except (yaml.YAMLError, TypeError, KeyError, AttributeError):
        return {}  # written for readers, not for programs
    if len(found) > 1:
        several = ", ".join(str(name) for name, _ in found)
        raise OpenQwenError(
            f"This data set has several configurations: {several}.", source, "give one of its files"
        )
    return found[0][1] if found else {}


def _patterns(files: Any) -> dict[str, list[str]]:
    """The card's `data_files`: one or more patterns, or objects with a split and its patterns."""
    if isinstance(files, str) or not all(isinstance(entry, dict) for entry in files):
        files = [{"split": "train", "path": files}]
    return {f["split"]: [f["path"]] if isinstance(f["path"], str) else f["path"] for f in files}


def _fetched(repository: str, revision: str | None, kind: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = f"{repository}@{revision}" if revision else repository
    here = f"path '{name}'" if kind == "model" else f"data set '{name}' here"
    hub = "the Hugging Face hub"
    try:
        return Path(
            snapshot_download(
                repository, repo_type=kind, revision=revision, allow_patterns=list(patterns)
            )
        )
    except GatedRepoError:
        what, do = (
            f"{hub} gives '{name}' only to those who accepted its terms.",
            "accept them there, and set HF_TOKEN",
        )
    except RevisionNotFoundError:
        what, do = (
            f"'{repository}' has no revision '{revision}'.",
            "give a branch, a tag or a commit after the @",
        )
    except RepositoryNotFoundError:
        what = f"There is no {here}, and no such repository on {hub}, or it is private."
        do = "check the spelling; for a private repository set HF_TOKEN"
    except LocalEntryNotFoundError:
        what = (
            f"There is no {here}, {hub} cannot be reached, and its cache here does not hold all of "
            f"'{name}'."
        )
        do = (
            "check the path and the network, unset HF_HUB_OFFLINE, or copy it here and give its "
            "path"
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        what, do = (
            f"'{name}' cannot be fetched from {hub}: {error}",
            "try again later, or give a local path",
        )
    raise OpenQwenError(what, where=name, do=do) from None
