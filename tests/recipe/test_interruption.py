"""Kills, Ctrl-C, two runs on one folder, a full disk: nothing finished is lost, and the result is
the same bytes.
"""

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openqwen.recipe.artifact import code_digest
from openqwen.recipe.graph import nodes_of, recipe_class
from openqwen.recipe.runner import run_recipe

FAKE = Path(__file__).with_name("fake_recipe.py")
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "shutil.rmtree"}


def digests(run: Path) -> dict[str, str]:
    return {
        name: json.loads((run / name / "manifest.json").read_text())["digest"]
        for name in ("corpus", "learn", "online-score")
    }


def in_child(output: str, kill_at: int | None = None, **options) -> tuple[int, int]:
    """Run the recipe in a forked process; SIGKILL it before its n-th change to the disk under the
    lock.

    Returns (wait status, number of changes).
    """
    code_digest()  # once, here: the children inherit it
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        count = -1

        def hook(event: str, details: tuple) -> None:
            nonlocal count
            if event == "fcntl.lockf":
                count = 0
            elif count >= 0 and (
                event in CHANGES or (event == "open" and set(details[1] or "") & set("wax+"))
            ):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            run_recipe(nodes_of(recipe_class()()), Path(output), **options)
            os.write(writer, str(count).encode())
        finally:
            os._exit(0 if sys.exc_info() == (None, None, None) else 1)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    with open(reader) as pipe:
        return status, int(pipe.read() or 0)


@pytest.mark.parametrize("forced", [False, True], ids=["fresh", "from"])
def test_kill_at_random_points_then_continue_gives_identical_artifacts(call, forced):
    _, changes = in_child("whole")
    expected = digests(Path("whole"))
    options = {}
    if forced:
        options["start_from"] = "corpus"
        _, changes = in_child("whole", **options)
        assert digests(Path("whole")) == expected
    assert changes > 40
    for point in random.Random(0).sample(range(1, changes + 1), 12):
        output = Path(f"killed{point}")
        if forced:
            in_child(output)
        status, _ = in_child(output, kill_at=point, **options)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        assert in_child(output)[0] == 0
        assert digests(output) == expected, f"killed before change {point}"
        assert list((output / ".work").iterdir()) == []
        assert [path for path in (output / ".store").iterdir() if path.name.startswith(".")] == []


def test_killed_many_times_still_arrives(call):
    in_child("whole")
    draw = random.Random(1)
    kills = 0
    while in_child("often", kill_at=draw.randint(8, 25))[0] != 0:
        kills += 1
        assert kills < 40
    assert kills > 3
    assert digests(Path("often")) == digests(Path("whole"))


def start(*arguments: str, **options) -> subprocess.Popen:
    # A shell that starts the tests in the background ignores Ctrl-C for all that it starts.
    options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    command = [sys.executable, str(FAKE), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def wait_for(path: Path) -> None:
    for _ in range(1000):
        if next(Path().glob(str(path)), None):
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} did not appear")


SAVED = Path("runs/tiny/.work/learn-*/scratch/state.json")


def test_second_run_says_who_holds_the_folder(call):
    first = start("run", "tiny.yaml", "--learn.train.pause", "1")
    try:
        wait_for(SAVED)
        assert call("run", "tiny.yaml") == 1
        assert f"process {first.pid} of " in call.err
        assert "--learn.train.pause 1" in call.err
        assert "Traceback" not in call.err
        assert call("run", "tiny.yaml", "--dry-run") == 0
    finally:
        first.kill()
        first.communicate()
    assert (
        call("run", "tiny.yaml") == 0
    )  # what the dead process wrote into the lock does not matter


def test_control_c_says_what_is_kept_and_how_to_continue(call):
    first = start("run", "tiny.yaml", "--from", "corpus", "--learn.train.pause", "0.3")
    wait_for(SAVED)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=20)
    assert first.returncode == 130
    assert "Interrupted in learn. Kept: 1 finished stage and the state that learn saved at" in out
    assert re.search(r"Continue with: \S*openqwen run tiny.yaml --learn.train.pause 0.3", out)
    assert "Traceback" not in out + err


def test_full_disk_is_said_and_nothing_is_lost(call):
    limit = 50_000

    def tight() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    full = start("run", "tiny.yaml", "--online-score.bytes", "100000", preexec_fn=tight)
    out, err = full.communicate(timeout=60)
    assert full.returncode == 1
    assert "There is no space left to write." in err
    assert "Kept: 2 finished stages" in out
    assert "Traceback" not in err
    assert call("run", "tiny.yaml", "--online-score.bytes", "100000") == 0
    assert call.ran == ["online-score"]
