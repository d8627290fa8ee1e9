"""How the user calls this program from where they stand."""

import shlex
import shutil
import sys
import sysconfig
from pathlib import Path


def command(*words: str | Path) -> str:
    """`openqwen` with these words, quoted for a shell: what the user can type here and now.

    It begins with `openqwen` where the shell finds this very program by that name, else with its
    path (below the current folder a relative one: `.venv/bin/openqwen`), or with `PYTHON -m
    openqwen.cli` where it was called so.
    """
    return shlex.join([*_program(), *map(str, words)])


def pip_install(package: str) -> str:
    """The command that installs a package, or an extra of this one, where this program runs."""
    return shlex.join([_near(Path(sys.executable)), "-m", "pip", "install", package])


def _program() -> list[str]:
    called = Path(sys.argv[0])
    beside = Path(sysconfig.get_path("scripts")) / "openqwen"
    script = called if called.stem == "openqwen" else beside
    if called.name == "cli.py" or not script.is_file():
        return [_near(Path(sys.executable)), "-m", "openqwen.cli"]
    found = shutil.which("openqwen")
    return ["openqwen" if found and Path(found).samefile(script) else _near(script)]


def _near(path: Path) -> str:
    """The path from the current folder where it lies below it; links stay, since they choose the
    environment.
    """
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
