"""Linux calls that Python's standard library does not have, by ctypes. Standard library alone."""

import ctypes
import os
import platform
import stat
import struct
from collections.abc import Iterable, Mapping

_LIBC = ctypes.CDLL(None, use_errno=True)

NEWNS, NEWCGROUP, NEWUTS, NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
READ_ONLY, NO_SUID, NO_DEVICES, NO_EXEC, REMOUNT = 1, 2, 4, 8, 32
BIND, RECURSIVE, PRIVATE = 4096, 16384, 1 << 18
DETACH = 2
_CHILD_SUBREAPER, _DUMPABLE, _NO_NEW_PRIVILEGES, _SECCOMP = 36, 4, 38, 22
_DROP_BOUNDING, _AMBIENT, _CLEAR_AMBIENT, _KEEP_CAPABILITIES, _PARENT_DEATH = 24, 47, 4, 8, 1
_CAPABILITIES_V3 = 0x20080522


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(number: int, *arguments: object) -> int:
    """A system call by its number. Raises OSError."""
    return _checked(_LIBC.syscall(ctypes.c_long(number), *arguments), f"system call {number}")


def unshare(flags: int) -> None:
    """Move this process into new namespaces."""
    _checked(_LIBC.unshare(flags), "unshare")


def enter(namespace: int) -> None:
    """Join the namespace of a file descriptor; for a PID namespace the next child does."""
    _checked(_LIBC.setns(namespace, 0), "setns")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    done = _LIBC.mount(
        source.encode(), target.encode(), kind.encode() or None, flags, data.encode() or None
    )
    _checked(done, f"mount {target}")


def read_only(target: str) -> None:
    """Make a mount and all below it read-only, without set-uid programs."""
    attributes = struct.pack("QQQQ", READ_ONLY | NO_SUID, 0, 0, 0)
    at_cwd, recursive = ctypes.c_int(-100), 0x8000
    syscall(442, at_cwd, target.encode(), recursive, attributes, ctypes.c_size_t(len(attributes)))


def pivot(root: str) -> None:
    """Make the mount at `root` the root of the file system, and let the old one go."""
    os.chdir(root)
    number = {"x86_64": 155, "aarch64": 41}[platform.machine()]
    syscall(number, b".", b".")
    _checked(_LIBC.umount2(b".", DETACH), "umount2")
    os.chdir("/")


def become_subreaper() -> None:
    """Let orphans below this process become its children."""
    _checked(_LIBC.prctl(_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl")


def die_with_parent() -> None:
    """Be killed when the parent ends."""
    _checked(_LIBC.prctl(_PARENT_DEATH, 9, 0, 0, 0), "prctl")


def set_dumpable(value: bool) -> None:
    """Whether processes of the same user may look into this one (/proc/PID/mem, ptrace)."""
    _checked(_LIBC.prctl(_DUMPABLE, int(value), 0, 0, 0), "prctl")


def become(user: int, file_user: int) -> None:
    """Change the user and group for good, as the superuser; `file_user` is asked of files."""
    os.setgroups([])
    os.setresgid(user, user, user)
    _checked(_LIBC.prctl(_KEEP_CAPABILITIES, 1, 0, 0, 0), "prctl")
    os.setresuid(user, user, user)
    # Of the capabilities that were kept, none is in effect until this says so.
    header, data = struct.pack("Ii", _CAPABILITIES_V3, 0), ctypes.create_string_buffer(24)
    _checked(_LIBC.capget(header, data), "capget")
    low = struct.unpack("6I", data.raw)
    data.raw = struct.pack("6I", low[1], low[1], low[2], low[4], low[4], low[5])
    _checked(_LIBC.capset(header, data), "capset")
    _LIBC.setfsuid(file_user)


def forbid_privileges() -> None:
    """No program that this process or its children start gets privileges."""
    _checked(_LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "prctl")
    _LIBC.prctl(_AMBIENT, _CLEAR_AMBIENT, 0, 0, 0)
    for capability in range(64):
        if _LIBC.prctl(_DROP_BOUNDING, capability, 0, 0, 0) < 0:
            break  # the kernel has no more of them, or they may not be dropped


def drop_capabilities() -> None:
    """Give up every capability for good."""
    header = struct.pack("Ii", _CAPABILITIES_V3, 0)
    _checked(_LIBC.capset(header, bytes(24)), "capset")


# --- seccomp: a list of calls that are refused -------------------------------------------------
# glibc needs calls that no list of allowed ones foresees (dify-sandbox issue 276), so this one
# names what is refused: x86-64 and arm64 numbers. -1: the machine has no such call.
_REFUSED = {
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "setns": (308, 268), "unshare": (272, 97), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "move_mount": (429, 429),
    "open_tree": (428, 428), "mount_setattr": (442, 442), "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "process_madvise": (440, 440), "pidfd_getfd": (438, 438),
    "kcmp": (312, 272), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "memfd_secret": (447, 447), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "acct": (163, 89), "quotactl": (179, 60), "quotactl_fd": (443, 443),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "clock_adjtime": (305, 266), "iopl": (172, -1), "ioperm": (173, -1), "modify_ldt": (154, -1),
    "personality": (135, 92), "fanotify_init": (300, 262), "syslog": (103, 116),
    "sethostname": (170, 161), "setdomainname": (171, 162), "vhangup": (153, 58),
    "lookup_dcookie": (212, 18), "mbind": (237, 235), "set_mempolicy": (238, 237),
    "migrate_pages": (256, 238), "move_pages": (279, 239), "shmget": (29, 194),
    "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "socket": (41, 198), "setuid": (105, 146), "setreuid": (113, 145), "setresuid": (117, 147),
    "setfsuid": (122, 151), "setgid": (106, 144), "setregid": (114, 143),
    "setresgid": (119, 149), "setfsgid": (123, 152), "setgroups": (116, 159),
}  # fmt: skip
# Refused where nothing else does it: starting programs, and making devices.
STARTING = {"execve": (59, 221), "execveat": (322, 281)}
DEVICES = {"mknod": (133, -1), "mknodat": (259, 33)}
_MACHINES = {"x86_64": (0, 0xC000003E, 56), "aarch64": (1, 0xC00000B7, 220)}  # column, audit, clone
_CLONE3 = 435
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_NAMESPACES = NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET


def seccomp_program(more: Mapping[str, tuple[int, int]] | None = None) -> bytes:
    """The filter as the kernel reads it: calls of another architecture kill, refused ones fail.

    more: calls that are refused beside those of the list.
    """
    column, audit, clone = _MACHINES[platform.machine()]
    lines = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, audit), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if column == 0:  # the x32 calls of x86-64
        lines += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _KILL)]
    for numbers in (_REFUSED | dict(more or {})).values():
        if numbers[column] >= 0:
            lines += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _ERROR | _EPERM)]
    # clone3 has its flags in memory, which a filter cannot read; libraries fall back on clone.
    lines += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERROR | _ENOSYS)]
    lines += [(_EQUAL, 0, 3, clone), (_LOAD, 0, 0, 16), (_ANY_BIT, 0, 1, _NAMESPACES)]
    lines += [(_RETURN, 0, 0, _ERROR | _EPERM), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("HBBI", *line) for line in lines)


class _SockProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def filter_calls(program: bytes) -> None:
    """Install a seccomp filter in this process and all that come of it."""
    wrapped = _SockProgram(len(program) // 8, program)
    _checked(_LIBC.prctl(_SECCOMP, 2, ctypes.byref(wrapped), 0, 0), "seccomp")


# --- Landlock: which files, from inside the process itself ----------------------------------------
_CREATE, _ADD, _RESTRICT = 444, 445, 446
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # ABI -> number of rights on files
_EXECUTE, _READ = 1 << 0, 1 << 2 | 1 << 3
_FOR_FILES = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14 | 1 << 15


def landlock_abi() -> int:
    """The version of Landlock that the kernel offers; 0 without it."""
    try:
        return syscall(_CREATE, None, ctypes.c_size_t(0), 1)
    except OSError:
        return 0


def ruleset(writable: Iterable[str], readable: Iterable[str], programs: Iterable[str]) -> int:
    """Rules that allow everything but starting programs below `writable`, reading below
    `readable`, and reading and starting what lies below `programs`; they refuse every other file,
    TCP, and signals and abstract sockets to processes outside. Returns a descriptor.
    """
    abi = landlock_abi()
    rights = (1 << _FILE_RIGHTS.get(abi, 16)) - 1
    attributes = struct.pack("QQQ", rights, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    rules = syscall(_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    groups = ((writable, rights & ~_EXECUTE), (readable, _READ), (programs, _READ | _EXECUTE))
    for paths, allowed in groups:
        for path in paths:
            _allow(rules, path, allowed)
    return rules


def restrict(rules: int) -> None:
    """Apply a ruleset to this process and all that come of it, for good."""
    syscall(_RESTRICT, rules, 0)


def _allow(rules: int, path: str, allowed: int) -> None:
    try:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # a folder that this system does not have
    try:
        folder = stat.S_ISDIR(os.fstat(opened).st_mode)
        rule = struct.pack("=Qi", allowed if folder else allowed & _FOR_FILES, opened)
        syscall(_ADD, rules, 1, rule, 0)
    finally:
        os.close(opened)
