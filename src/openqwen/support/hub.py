"""Where a model is: a path, or the id of a repository on the Hugging Face hub, fetched once and kept in its cache."""

import re
from pathlib import Path

from openqwen.support.errors import OpenQwenError

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


def local(source: str | Path) -> Path:
    """The path of a model. `owner/name` or `owner/name@revision` that is no path is fetched from the hub.

    The environment decides as in all software that uses the hub: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE. Raises
    OpenQwenError where the repository cannot be had.
    """
    match = _ID.fullmatch(str(source))
    if match is None or Path(source).exists():
        return Path(source)
    return _fetched(match["repository"], match["revision"])


def _fetched(repository: str, revision: str | None) -> Path:
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
    hub = "the Hugging Face hub"
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_FILES))
    except GatedRepoError:
        what, do = f"{hub} gives '{name}' only to those who accepted its terms.", "accept them there, and set HF_TOKEN"
    except RevisionNotFoundError:
        what, do = f"'{repository}' has no revision '{revision}'.", "give a branch, a tag or a commit after the @"
    except RepositoryNotFoundError:
        what = f"There is no path '{name}', and no such repository on {hub}, or it is private."
        do = "check the spelling; for a private repository set HF_TOKEN"
    except LocalEntryNotFoundError:
        what = f"There is no path '{name}', {hub} cannot be reached, and its cache here does not hold all of '{name}'."
        do = "check the path and the network, unset HF_HUB_OFFLINE, or copy the folder here and give its path"
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        what, do = f"'{name}' cannot be fetched from {hub}: {error}", "try again later, or give a local path"
    raise OpenQwenError(what, where=name, do=do) from None
