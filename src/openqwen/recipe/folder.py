"""The run folder: artifacts in `.store`, work in progress in `.work`, a link for each stage."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from openqwen.recipe.artifact import Artifact, open_artifact, recover
from openqwen.support.errors import OpenQwenError


class RunFolder:
    """Paths and records of one run folder; only `prepare_root` and `prepare` make folders."""

    def __init__(self, root: Path):
        self.root = root
        self.store = root / ".store"
        self.work = root / ".work"
        self.lock = root / ".lock"
        self._anew = self.work / "anew"  # an empty file for each stage that `--from` requested

    def prepare_root(self) -> None:
        """Make the run folder itself, which holds the lock."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            what = f"The run folder cannot be made: {error.strerror}."
            raise OpenQwenError(what, self.root, "choose another --output") from None

    def prepare(self) -> None:
        """Make the folders and delete half-written files of killed runs; call it under the lock."""
        self.store.mkdir(exist_ok=True)
        self.work.mkdir(exist_ok=True)
        recover(self.store)
        for aside in self.work.glob(".*"):
            aside.unlink()
        for work in self.work.glob("*-*"):
            stage = work.name[: -len("-0123456789ab")]
            finished = (self.store / work.name).exists() and stage not in self.pending()
            shutil.rmtree(work if finished else work / "output", ignore_errors=True)

    def stored(self, stage: str, key: str) -> Path:
        """Return the path of the finished artifact with that key, whether or not it exists."""
        return self.store / f"{stage}-{key[:12]}"

    def working(self, stage: str, key: str) -> Path:
        """Return the folder in which the artifact with that key is made."""
        return self.work / f"{stage}-{key[:12]}"

    def link(self, stage: str, artifact: Path) -> None:
        """Make the stage's link point at an artifact, atomically."""
        link = self.root / stage
        if link.exists() and not link.is_symlink():
            raise OpenQwenError("A stage's link cannot be made here.", link, "move this file away")
        path = os.path.relpath(artifact, self.root)
        if link.is_symlink() and os.readlink(link) == path:
            return
        aside = self.work / f".{stage}.link"
        aside.unlink(missing_ok=True)
        aside.symlink_to(path)
        os.replace(aside, link)

    def current(self, stage: str) -> Artifact | None:
        """Return the artifact that the stage's link points at, or None if it cannot be read."""
        return _read(self.root / stage)

    def former(self, stage: str) -> Artifact | None:
        """Return the current artifact of a stage, or else the youngest finished one, or None."""
        if current := self.current(stage):
            return current
        artifacts = [_read(path) for path in sorted(self._of(self.store, stage))]
        readable = [artifact for artifact in artifacts if artifact is not None]
        return max(readable, key=lambda artifact: artifact.manifest.created, default=None)

    def pending(self) -> list[str]:
        """Return the stages that `--from` requested and that are not remade yet."""
        return sorted(path.name for path in self._anew.glob("*"))

    def demand(self, stages: Iterable[str]) -> None:
        """Request that this run, or one that continues it, makes these stages from their start."""
        for stage in stages:
            self._anew.mkdir(exist_ok=True)
            for work in self._of(self.work, stage):
                shutil.rmtree(work, ignore_errors=True)
            (self._anew / stage).touch()

    def fulfil(self, stage: str) -> None:
        """Record that a requested stage was remade."""
        (self._anew / stage).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # other stages are pending, or none ever was
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
