"""How a forked process confines itself before it reads a program. Standard library alone.

The tier "strict": namespaces for users, processes, mounts, network, IPC, names and control groups.
The root is a small read-only tmpfs with the system's libraries and Python's standard library; /box
is a fresh tmpfs of a fixed size with /work and /tmp. Both tiers: user 65534, no capabilities, no
new privileges, Landlock, a seccomp filter, resource limits.
"""

import contextlib
import glob
import json
import os
import resource
import stat
import sys
from collections.abc import Callable, Sequence
from typing import Any

from openqwen.sandbox import kernel

NOBODY = 65534
# Mono, PHP and Java do not run without their settings.
_SETTINGS = ("/etc/alternatives", "/etc/mono", "/etc/php", *glob.glob("/etc/java-*-openjdk"))
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin", *_SETTINGS)
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/localtime")
DEVICES = ("null", "zero", "full", "random", "urandom")
BOX = "/box"
ENVIRONMENT = {
    "HOME": "/work",
    "LANG": "C.UTF-8",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "PYTHONHASHSEED": "0",
}
# Python's standard library, which every program may read.
LIBRARY = os.path.dirname(os.__file__)
_PACKAGES = ("site-packages", "dist-packages")
_BOX_FLAGS = kernel.NO_SUID | kernel.NO_DEVICES
EXTRA = "/packages"  # modules of the caller that a pool lets in by name


class Shell:
    """What a zygote prepares once for all its runs: the root and the filter.

    tier: see tiers.py. packages: paths of modules that programs may import.
    """

    def __init__(self, tier: str, packages: Sequence[str]):
        self.strict, self.guest = tier == "strict", tier == "gvisor"
        self.packages = list(packages)
        # Where Landlock does not keep Python programs from starting others, the filter does.
        more = kernel.DEVICES if self.guest else {}
        self.filters = {
            True: kernel.seccomp_program(more),
            False: kernel.seccomp_program(more | kernel.STARTING if self.guest else more),
        }
        self.processes = -1
        self._rules: dict[bool, int] = {}
        self.size = 0  # address space of the zygote, which is not the program's

    def separate(self, ask_for_map: Callable[[], None]) -> None:
        """Go on in a child that is the first process of new namespaces, as user 65534.

        ask_for_map: has the caller write the user map, which takes the superuser's rights.
        """
        superuser, user, group = os.geteuid() == 0, os.geteuid(), os.getegid()
        if superuser:
            os.setgroups([])
        spaces = kernel.NEWNS | kernel.NEWNET | kernel.NEWIPC | kernel.NEWUTS | kernel.NEWCGROUP
        kernel.unshare(kernel.NEWUSER | kernel.NEWPID | spaces)
        # By the caller's rights, which end here.
        opened = [(to, os.open(path, os.O_PATH)) for to, path in sources(self.packages).items()]
        if superuser:
            ask_for_map()
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            kernel.set_dumpable(True)
        else:
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", f"{NOBODY} {user} 1")
            _write("/proc/self/gid_map", f"{NOBODY} {group} 1")
        if child := os.fork():
            os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
        self.processes = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        _build_root(opened)
        if kernel.landlock_abi():
            everything = kernel.ruleset(["/"], [], [])
            self._rules = {False: everything, True: kernel.ruleset(["/"], [], ["/"])}

    def enter_box(self) -> None:
        """Mount the run's own folders and processes; the caller is the first process of its
        namespace. The run's limits are not known yet.
        """
        kernel.unshare(kernel.NEWNS | kernel.NEWIPC)
        kernel.mount("box", BOX, "tmpfs", _BOX_FLAGS, "size=1m,mode=755")
        for name in ("work", "tmp", "shm"):
            os.mkdir(f"{BOX}/{name}", 0o700)
        with contextlib.suppress(OSError):
            kernel.mount("proc", "/proc", "proc", _BOX_FLAGS | kernel.NO_EXEC)
            be_killed_first()
            kernel.read_only("/proc")

    def limit_box(self, megabytes: int, files: int) -> None:
        """Set how much the run's folders may hold."""
        size = f"size={megabytes}m,nr_inodes={files}"
        kernel.mount("box", BOX, flags=_BOX_FLAGS | kernel.REMOUNT, data=size)

    def rules(self, work: str, programs: bool) -> int:
        """The Landlock rules of a run, a descriptor.

        With namespaces the root holds nothing but what may be read, and /box alone can be written:
        the rules are the same for every run, and keep Python programs from starting others.
        """
        if self.strict:
            return self._rules[programs]
        devices = [f"/dev/{name}" for name in DEVICES]
        read = [LIBRARY, *SYSTEM_FILES, *devices, *self.packages]
        write = [work, "/dev/null"] if work else ["/dev/null"]  # the checker has no folder
        if programs:
            return kernel.ruleset(write, read, [*SYSTEM, work])
        return kernel.ruleset(write, [*read, *SYSTEM], [])

    def packages_path(self) -> list[str]:
        """Entries of `sys.path` for the packages that are let in."""
        if self.strict:
            return [EXTRA] if self.packages else []
        return list(dict.fromkeys(os.path.dirname(path) for path in self.packages))


def be_killed_first() -> None:
    """Where memory runs out, the kernel ends this process before the zygote."""
    with contextlib.suppress(OSError):
        _write("/proc/self/oom_score_adj", "1000")


def give_up(shell: Shell, limits: dict[str, float], work: str, programs: bool) -> None:
    """Confine this process for good: privileges, files, resources, system calls.

    Only descriptors 0, 1, 2 and those that the caller keeps on purpose may be open.
    """
    if not shell.strict and os.geteuid() == 0:
        # The interpreter may lie in the superuser's home: Python's file user stays, and Landlock
        # guards the files. Other programs lose it when they start.
        kernel.become(NOBODY, NOBODY if programs or shell.guest else 0)
    tasks = 5 if shell.strict else _tasks()
    kernel.drop_capabilities()
    if kernel.landlock_abi():
        kernel.restrict(shell.rules(work, programs))
    elif not shell.strict and not shell.guest:
        raise OSError("Landlock is missing, and there are no namespaces")
    set_limits(limits, tasks, shell.size, shell.guest)
    kernel.filter_calls(shell.filters[programs])


def set_limits(limits: dict[str, float], tasks: int, size: int, guest: bool = False) -> None:
    """Resource limits of this process and its children; `limits` holds the fields of `Limits`.

    tasks: processes and threads that the user has already: the zygote, this run's two and the two
    that wait for the next in a user namespace, all of the user's without one. size: address space,
    bytes, that is not the program's. guest: gVisor's kernel has no limit of processes, core files
    and queues.
    """
    seconds = max(1, int(-(-limits["seconds"] // 1)))
    memory, disk = int(limits["memory_mb"]) << 20, int(limits["disk_mb"]) << 20
    values = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: memory + size,
        resource.RLIMIT_FSIZE: disk,
        resource.RLIMIT_NPROC: int(limits["processes"]) + tasks,
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_MEMLOCK: 1 << 16,
    }
    for kind, value in values.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(*([ValueError] if guest else [])):
            resource.setrlimit(kind, (value, value))


def put_files(payload: dict[str, Any], folder: str) -> None:
    """Write a program's files below `folder`. Their names were checked by the pool."""
    for name, text in payload["files"].items():
        path = f"{folder}/{name}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(text.encode("latin-1"))


def hand_over(folder: str) -> None:
    """Give a run's folder to user 65534."""
    for path, _, names in os.walk(folder):
        for name in (path, *(f"{path}/{name}" for name in names)):
            os.chown(name, NOBODY, NOBODY)


def read_payload(descriptor: int) -> dict[str, Any]:
    """A run's JSON from a memory file."""
    with os.fdopen(descriptor, "rb") as file:
        loaded: dict[str, Any] = json.loads(file.read())
        return loaded


def own_size() -> int:
    """Address space of this process, bytes."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 64 << 20


def _tasks() -> int:
    """Processes and threads of this user on the whole machine."""
    user, count = os.getuid(), 3
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and entry.stat().st_uid == user:
                count += len(os.listdir(f"/proc/{entry.name}/task"))
        except OSError:
            continue  # it has just ended
    return count


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def sources(packages: Sequence[str]) -> dict[str, str]:
    """What a root holds: the place there -> the path here."""
    places = {path: path for path in (*SYSTEM, *SYSTEM_FILES) if _is_real(path)}
    if not any(LIBRARY.startswith(path + "/") for path in places):
        places[LIBRARY] = LIBRARY
    places |= {f"/dev/{name}": f"/dev/{name}" for name in DEVICES}
    places |= {f"{EXTRA}/{os.path.basename(path)}": path for path in packages}
    return places


def _is_real(path: str) -> bool:
    return os.path.exists(path) and not os.path.islink(path)


def _build_root(opened: Sequence[tuple[str, int]]) -> None:
    links = {path: os.readlink(path) for path in SYSTEM if os.path.islink(path)}
    kernel.mount("none", "/", flags=kernel.RECURSIVE | kernel.PRIVATE)
    root = "/tmp"
    kernel.mount("root", root, "tmpfs", kernel.NO_SUID, "size=1m,mode=755")
    for place, descriptor in opened:
        target = root + place
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        kernel.mount(f"/proc/self/fd/{descriptor}", target, flags=kernel.BIND | kernel.RECURSIVE)
        os.close(descriptor)
    for path, target in links.items():
        os.symlink(target, root + path)
    for folder in (BOX, "/proc", "/dev", EXTRA):
        os.makedirs(root + folder, exist_ok=True)
    for name, target in (("work", "/work"), ("tmp", "/tmp"), ("shm", "/dev/shm")):
        os.symlink(f"{BOX}/{name}", root + target)
    for folder in _package_folders(root):
        kernel.mount("none", folder, "tmpfs", 0, "size=4k,mode=755")
    # A run may mount its own /proc only where one can be seen. In a container it may be partly
    # hidden from us too: runs have none there.
    with contextlib.suppress(OSError):
        kernel.mount("proc", root + "/proc", "proc", kernel.NO_SUID | kernel.NO_EXEC)
    kernel.read_only(root)
    kernel.pivot(root)


def _package_folders(root: str) -> list[str]:
    """Folders of installed packages, which an empty one hides."""
    version = os.path.basename(LIBRARY)
    bases = {LIBRARY, f"/usr/lib/{version}", f"/usr/local/lib/{version}", "/usr/lib/python3"}
    found = {root + f"{base}/{name}" for base in bases for name in _PACKAGES}
    return sorted(path for path in found if os.path.isdir(path))


def warm_up(modules: Sequence[str]) -> None:
    """Import what programs use most, once for all runs; a module that is not here is left out."""
    for name in modules:
        try:
            __import__(name)
        except ImportError:
            print(f"sandbox: no module {name}", file=sys.stderr)
