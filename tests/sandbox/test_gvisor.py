"""The tier "gvisor": its container's configuration, a stand-in for runsc, and runsc itself."""

import json
import shutil
import stat
import sys

import pytest

from openqwen.sandbox import Limits, Pool, Program, confine, gvisor, tiers
from openqwen.sandbox.attacks import attacks, try_attacks
from openqwen.support.errors import OpenQwenError

needs_runsc = pytest.mark.skipif(shutil.which("runsc") is None, reason="runsc is not installed")
# Does what guest.py does with a line of JSON, as the program's source says.
STAND_IN = """#!{python}
import json, sys, time
words = sys.argv[1:]
open({log!r}, "a").write(json.dumps(words) + "\\n")
if "run" not in words: raise SystemExit
print(json.dumps("ready"), flush=True)
for line in sys.stdin:
    source = json.loads(line)["source"]
    if source == "hang": time.sleep(60)
    if source == "garbage": print("}}{{", flush=True)
    if source == "end": sys.exit("the container's last words")
    if source == "fields": print(json.dumps({{"status": "passed", "unknown": 1}}), flush=True)
    if source == "flood": print("x" * 10**6, flush=True)
    print(json.dumps({{"status": "passed", "stdout": source}}), flush=True)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A `runsc` that runs no container; returns the file with its command lines."""
    log, program = tmp_path / "log", tmp_path / "runsc"
    program.write_text(STAND_IN.format(python=sys.executable, log=str(log)))
    program.chmod(0o755)
    monkeypatch.setattr(gvisor, "runsc", lambda: str(program))
    monkeypatch.setattr(tiers, "runsc", lambda: str(program))
    return log


def test_without_runsc_the_tier_is_refused(monkeypatch):
    monkeypatch.setattr(tiers, "runsc", lambda: None)
    with pytest.raises(OpenQwenError, match="gVisor is not installed"):
        Pool(1, tier="gvisor")


def test_one_container_runs_many_programs_and_is_deleted(stand_in):
    with Pool(1, tier="gvisor") as pool:
        verdicts = pool.run([Program(str(n)) for n in range(5)])
    assert [(v.status, v.stdout) for v in verdicts] == [("passed", str(n)) for n in range(5)]
    words = [json.loads(line) for line in stand_in.read_text().splitlines()]
    assert ["run" in line for line in words] == [True, False, False]
    assert "--network=none" in words[0]
    name = words[0][-1]
    assert ["delete" in words[2], words[2][-1]] == [True, name]
    bundle = next(word for word in words[0] if word.startswith("--bundle=")).partition("=")[2]
    assert not shutil.os.path.exists(bundle)


@pytest.mark.parametrize("source", ["hang", "garbage", "end", "fields", "flood"])
def test_a_container_that_fails_is_infra_and_the_next_run_has_a_new_one(
    stand_in, source, monkeypatch
):
    monkeypatch.setattr(gvisor, "_GRACE", 0.3)
    monkeypatch.setattr(gvisor, "_LARGEST", 10_000)
    with Pool(1, tier="gvisor") as pool:
        bad, good = pool.run([Program(source, limits=Limits(wall_seconds=0.1)), Program("fine")])
    assert bad.status == "infra"
    assert (good.status, good.stdout) == ("passed", "fine")
    if source == "end":
        assert "last words" in bad.reason


def test_a_container_that_does_not_start_is_infra(monkeypatch):
    monkeypatch.setattr(gvisor, "runsc", lambda: "/bin/false")
    monkeypatch.setattr(tiers, "runsc", lambda: "/bin/false")
    with Pool(1, tier="gvisor") as pool:
        assert pool.run([Program("")])[0].status == "infra"


def test_the_container_holds_nothing_of_the_caller(tmp_path):
    config = gvisor._bundle(tmp_path, ["/somewhere/site-packages/numpy"])
    assert config["root"] == {"path": "rootfs", "readonly": True}
    assert {"pid", "network", "mount"} <= {space["type"] for space in config["linux"]["namespaces"]}
    binds = {m["destination"]: m for m in config["mounts"] if m["type"] == "bind"}
    assert all("ro" in mount["options"] for mount in binds.values())
    allowed = (*confine.SYSTEM, *confine.SYSTEM_FILES, confine.LIBRARY, confine.EXTRA, "/host")
    assert all(place.startswith(allowed) or place == str(tiers.interpreter()) for place in binds)
    assert not any(place in ("/", "/home", "/root", "/tmp") for place in binds)
    empty = {m["destination"]: m["options"] for m in config["mounts"] if m["type"] == "tmpfs"}
    assert empty == {"/proc": ["mode=0700"], "/sys": ["mode=0700"], "/tmp": ["mode=0755"]}
    assert stat.S_IMODE((tmp_path / "rootfs/host").stat().st_mode) == 0o700
    process = config["process"]
    assert process["noNewPrivileges"]
    assert not any("SYS_" in name for name in process["capabilities"]["bounding"])
    assert all(entry.partition("=")[0] in confine.ENVIRONMENT for entry in process["env"])


@needs_runsc
def test_programs_and_limits_in_gvisor():
    programs = [
        Program("import os; print(os.uname().nodename, os.getuid())"),
        Program("print(open('a').read(), input())", "in", {"a": "file"}),
        Program("def f(x): return x + 1", tests="assert f(1) == 2"),
        Program("import os; os._exit(0)", tests="assert f(1) == 2"),
        Program("while True: pass", limits=Limits(seconds=1)),
        Program("import time; time.sleep(60)", limits=Limits(wall_seconds=1)),
        Program("x = 'a' * 10**9", limits=Limits(memory_mb=128)),
        Program("print('a' * 10**7)"),
        Program("echo $((6 * 7))", language="bash"),
    ]
    with Pool(1, tier="gvisor") as pool:
        verdicts = pool.run(programs)
    assert [v.status for v in verdicts] == [
        "passed", "passed", "passed", "failed", "timeout", "timeout", "memory", "output", "passed",
    ]  # fmt: skip
    assert verdicts[0].stdout == "sandbox 65534\n"
    assert verdicts[1].stdout == "file in\n"
    assert verdicts[8].stdout == "42\n"


@pytest.mark.slow
@needs_runsc
def test_all_attacks_are_contained_in_gvisor():
    escaped = [outcome for outcome in try_attacks("gvisor", attacks()) if not outcome.contained]
    assert escaped == []
