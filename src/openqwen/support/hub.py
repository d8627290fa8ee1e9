"""Models and data sets on the Hugging Face hub, downloaded once into the hub's cache.

A model is `owner/name[@revision]`, a data set `hub:owner/name[@revision][:split]`.
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
# The words in file names by which the library `datasets` recognises splits.
_SPLITS = {"train": {"train", "training"}, "test": {"test", "testing", "eval", "evaluation"}}
_SPLITS |= {"validation": {"validation", "valid", "dev", "val"}}
_SHARD = re.compile(r"data/(\w+)-\d{5}-of-\d{5}")


def local(source: str | Path) -> Path:
    """The path of a model: the given path, or where the hub's `owner/name[@revision]` was put.

    A path that exists is taken first. The usual variables apply: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE.
    Raises OpenQwenError where the repository cannot be downloaded.
    """
    match = _ID.fullmatch(str(source))
    if match is None or Path(source).exists():
        return Path(source)
    return _fetched(match["repository"], match["revision"], "model", _FILES)


def dataset_files(source: str) -> list[Path]:
    """The files of a split of `hub:owner/name[@revision][:split]`, in order; the default is train.

    The data set's card (README.md) says which files belong to a split; without it their names do,
    as in `datasets`. Raises OpenQwenError where the data set cannot be downloaded or has no such
    split.
    """
    folder, repository, split = _dataset(source)
    splits = _splits(folder, source)
    if files := splits.get(split):
        return files
    if not splits:
        what = f"There is no split '{split}': this data set has no files that can be read."
        raise OpenQwenError(what, source, f"give one with {', '.join(DATA_SUFFIXES)} files")
    what = f"There is no split '{split}', only: {', '.join(splits)}.{suggestion(split, splits)}"
    raise OpenQwenError(what, source, f"give {HUB}{repository}:SPLIT")


def pinned(source: str) -> str:
    """The same data set at the commit to which its revision points now.

    Reading it later gives the same records.
    """
    folder, repository, split = _dataset(source)
    return f"{HUB}{repository}@{folder.name}:{split}"


def _dataset(source: str) -> tuple[Path, str, str]:
    """The folder of a data set's commit, its repository, and the split that `source` names."""
    identifier, _, split = source.removeprefix(HUB).partition(":")
    if (match := _ID.fullmatch(identifier)) is None:
        what = "This is not the name of a data set."
        raise OpenQwenError(what, source, f"write {HUB}owner/name:split")
    folder = _fetched(match["repository"], match["revision"], "dataset", _DATA_FILES)
    return folder, match["repository"], split or "train"


def _splits(folder: Path, source: str) -> dict[str, list[Path]]:
    """Files by split: as the card says, else by words in their paths, else all are `train`."""
    paths = sorted(path for path in folder.rglob("*") if path.name.endswith(DATA_SUFFIXES))
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    splits: dict[str, list[Path]] = {}
    if patterns := _card_patterns(folder / "README.md", source):
        for split, globs in patterns.items():
            matches = (name for name in names if any(fnmatch(name, glob) for glob in globs))
            splits[split] = [names[name] for name in matches]
        return splits
    for name, path in names.items():
        words = set(re.split(r"[^a-zA-Z]+", name))
        shard = _SHARD.search(name)
        named = [shard[1]] if shard else [s for s, known in _SPLITS.items() if words & known]
        if named:
            splits.setdefault(named[0], []).append(path)
    return splits or ({"train": paths} if paths else {})


def _card_patterns(card: Path, source: str) -> dict[str, list[str]]:
    """The card's file patterns by split; {} where it has none.

    They are those of its only or its default configuration.
    """
    from huggingface_hub import metadata_load

    try:
        configs = [c for c in (metadata_load(card) or {})["configs"] if "data_files" in c]
        defaults = [c for c in configs if c.get("default") or c["config_name"] == "default"]
        chosen = {c["config_name"]: _patterns(c["data_files"]) for c in defaults or configs}
    except (OSError, yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # there is no card, or its head is free text
    if len(chosen) > 1:
        what = f"This data set has several configurations: {', '.join(map(str, chosen))}."
        raise OpenQwenError(what, source, "give one of its files")
    return next(iter(chosen.values()), {})


def _patterns(files: Any) -> dict[str, list[str]]:
    """File patterns by split of the card's `data_files`, in any of the forms that it may have."""
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
    path = f"path '{name}'" if kind == "model" else f"data set '{name}' here"
    hub = "the Hugging Face hub"
    try:
        return Path(
            snapshot_download(
                repository, repo_type=kind, revision=revision, allow_patterns=list(patterns)
            )
        )
    except GatedRepoError:
        what = f"'{name}' is only for users who accepted its terms on {hub}."
        do = "accept them there, and set HF_TOKEN"
    except RevisionNotFoundError:
        what = f"'{repository}' has no revision '{revision}'."
        do = "give a branch, a tag or a commit after the @"
    except RepositoryNotFoundError:
        what = f"There is no {path}, and no such repository on {hub}, or it is private."
        do = "check the spelling; for a private repository set HF_TOKEN"
    except LocalEntryNotFoundError:
        what = (
            f"There is no {path}, {hub} cannot be reached, and the cache lacks files of '{name}'."
        )
        do = (
            "check the path and the network, unset HF_HUB_OFFLINE, or give the path of a local copy"
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        what = f"'{name}' cannot be downloaded from {hub}: {error}"
        do = "try again later, or give a local path"
    raise OpenQwenError(what, where=name, do=do) from None
