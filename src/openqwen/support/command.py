"""Commands that a message can show to the user, as they work in the user's shell."""

import shlex
import shutil
import sys
import sysconfig
from pathlib import Path


def command(*words: str | Path) -> str:
    """The command `openqwen WORDS`, quoted for a shell, as the user can type it in this folder.

    It begins with `openqwen` where the shell finds this program by that name, else with its path
    (relative if below the current folder: `.venv/bin/openqwen`), or with `PYTHON -m openqwen.cli`
    if the program was started like that.
    """
    return shlex.join([*_program(), *map(str, words)])


def pip_install(package: str) -> str:
    """The command that installs a package into this program's environment."""
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
    """The path, relative if below the current folder.

    Links are not resolved: the link to a Python interpreter decides which environment it uses.
    """
    path = path.absolute()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
