"""Commands that the program suggests work where the user stands: each is read off the output and
given to a shell.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = "#!{python}\nimport sys\nfrom openqwen.cli import main\nsys.exit(main())\n"


@pytest.fixture
def place(tmp_path):
    """A folder with an environment of its own, as `make run` leaves it; its name has a space."""
    bin = tmp_path / "my project" / ".venv" / "bin"
    bin.mkdir(parents=True)
    (bin / "openqwen").write_text(SCRIPT.format(python=sys.executable))
    (bin / "openqwen").chmod(0o755)
    return tmp_path / "my project"


def suggested(place, path, *program):
    """The program's own name in what it suggests after a mistake, which a shell can run."""
    source = str(Path(__file__).parents[2] / "src")
    here = {"cwd": place, "env": {**os.environ, "PATH": path, "PYTHONPATH": source}, "text": True}
    told = subprocess.run([*program, "report"], capture_output=True, **here).stderr
    line = re.search(r"such as: (.*) report runs/tiny$", told, re.MULTILINE)[1]
    works = subprocess.run(f"{line} --version", shell=True, capture_output=True, **here)
    assert works.stdout.startswith("openqwen 0."), works.stderr
    return line


def test_by_its_path_where_the_shell_does_not_find_it(place):
    assert suggested(place, "/usr/bin:/bin", ".venv/bin/openqwen") == ".venv/bin/openqwen"
    whole = f"'{place}/.venv/bin/openqwen'"
    assert suggested(place / ".venv", "/usr/bin:/bin", "bin/openqwen") == "bin/openqwen"
    assert (
        suggested(place.parent, "/usr/bin:/bin", place / ".venv/bin/openqwen")
        == "'my project/.venv/bin/openqwen'"
    )
    assert suggested(Path("/"), "/usr/bin:/bin", place / ".venv/bin/openqwen") == whole.replace(
        "'/", "'", 1
    )


def test_by_its_name_where_the_shell_finds_this_one(place):
    path = f"{place}/.venv/bin:/usr/bin:/bin"
    assert suggested(place, path, place / ".venv/bin/openqwen") == "openqwen"
    (place / "bin").mkdir()
    (place / "bin/openqwen").symlink_to(
        place / ".venv/bin/openqwen"
    )  # as pipx and uv put it on the path
    assert suggested(place, f"{place}/bin:/usr/bin:/bin", place / "bin/openqwen") == "openqwen"


def test_another_program_of_that_name_is_not_taken_for_it(place):
    (place / "bin").mkdir()
    (place / "bin/openqwen").write_text("#!/bin/sh\nexit 3\n")
    (place / "bin/openqwen").chmod(0o755)
    assert (
        suggested(place, f"{place}/bin:/usr/bin:/bin", ".venv/bin/openqwen") == ".venv/bin/openqwen"
    )


def test_as_a_module_where_it_was_called_so(place):
    line = suggested(place, "/usr/bin:/bin", sys.executable, "-m", "openqwen.cli")
    assert line == f"{sys.executable} -m openqwen.cli"
