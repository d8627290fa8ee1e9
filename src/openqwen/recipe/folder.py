"""The run folder: finished artifacts in `.store`, work in progress in `.work`, a link a stage to
its current one.
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from openqwen.recipe.artifact import Artifact, open_artifact, recover
from openqwen.support.errors import OpenQwenError


class RunFolder:
    """Paths and bookkeeping of one run folder.

    Reading makes nothing; only `prepare` makes folders.
    """

    def __init__(self, root: Path):
        self.root = root
        self.store = root / ".store"
        self.work = root / ".work"
        self.lock = root / ".lock"
        self._anew = self.work / "anew"  # an empty file for each stage that a `--from` asked for

    def prepare_root(self) -> None:
        """Make the run folder itself, for the lock to lie in."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise OpenQwenError(
                f"The run folder cannot be made: {error.strerror}.",
                where=self.root,
                do="choose another --output",
            ) from None

    def prepare(self) -> None:
        """Make the folders, and clear away what killed runs left half-written.

        Only under the lock.
        """
        self.store.mkdir(exist_ok=True)
        self.work.mkdir(exist_ok=True)
        recover(self.store)
        for aside in self.work.glob(".*"):
            aside.unlink()
        for work in self.work.glob("*-*"):
            finished = (self.store / work.name).exists() and work.name[
                : -len("-0123456789ab")
            ] not in self.pending()
            shutil.rmtree(work if finished else work / "output", ignore_errors=True)

    def stored(self, stage: str, key: str) -> Path:
        """Where the finished artifact of that key lies, or will."""
        return self.store / f"{stage}-{key[:12]}"

    def working(self, stage: str, key: str) -> Path:
        """Where the artifact of that key is made."""
        return self.work / f"{stage}-{key[:12]}"

    def link(self, stage: str, artifact: Path) -> None:
        """Point runs/x/<stage> at an artifact, in one step."""
        link = self.root / stage
        if link.exists() and not link.is_symlink():
            raise OpenQwenError(
                "Something that is not a link stands where a stage's link goes.",
                link,
                "move it away",
            )
        path = os.path.relpath(artifact, self.root)
        if link.is_symlink() and os.readlink(link) == path:
            return
        aside = self.work / f".{stage}.link"
        aside.unlink(missing_ok=True)
        aside.symlink_to(path)
        os.replace(aside, link)

    def current(self, stage: str) -> Artifact | None:
        """The artifact that the stage's link shows, None where there is none that can be read."""
        return _read(self.root / stage)

    def former(self, stage: str) -> Artifact | None:
        """The current artifact of a stage, or the youngest finished one."""
        found = [_read(path) for path in sorted(self._of(self.store, stage))]
        youngest = max(
            (a for a in found if a is not None), key=lambda a: a.manifest.created, default=None
        )
        return self.current(stage) or youngest

    def pending(self) -> list[str]:
        """Stages that a `--from` asked for and that were not made anew yet."""
        return sorted(path.name for path in self._anew.glob("*"))

    def demand(self, stages: Iterable[str]) -> None:
        """Have these stages made anew, from their beginning, by this run or the ones that continue
        it.
        """
        for stage in stages:
            self._anew.mkdir(exist_ok=True)
            for work in self._of(self.work, stage):
                shutil.rmtree(work, ignore_errors=True)
            (self._anew / stage).touch()

    def fulfil(self, stage: str) -> None:
        """The stage was made anew."""
        (self._anew / stage).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # others wait, or there is none
            self._anew.rmdir()

    @staticmethod
    def _of(parent: Path, stage: str) -> list[Path]:
        pattern = re.compile(re.escape(stage) + "-[0-9a-f]{12}")
        return [path for path in parent.glob(f"{stage}-*") if pattern.fullmatch(path.name)]


def _read(folder: Path) -> Artifact | None:
    if not folder.is_dir():
        return None
    try:
        return open_artifact(folder, do="")
    except OpenQwenError:
        return None
