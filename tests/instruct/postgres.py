"""A PostgreSQL server of the test's own, run by an unprivileged user on a socket in a folder."""

import os
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest


def programs():
    """The folder of PostgreSQL's programs; the test is skipped without one."""
    pytest.importorskip("pg8000", reason="pg8000 is not installed")
    for name in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), reverse=True):
        return name.parent
    found = shutil.which("initdb")
    if not found:
        pytest.skip("PostgreSQL is not installed (Debian's package: postgresql)")
    return Path(found).parent


@contextmanager
def server(options=""):
    """The base URL of a running server; `new_database` makes a database of it."""
    bin_ = programs()
    as_user = []
    if os.geteuid() == 0:  # initdb refuses root
        if subprocess.run(["id", "postgres"], capture_output=True).returncode:
            pytest.skip("there is no user 'postgres' to run PostgreSQL as")
        as_user = ["runuser", "-u", "postgres", "--"]
    folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # a socket's path is short
    data = folder / "data"
    try:
        if as_user:
            shutil.chown(folder, "postgres")
        folder.chmod(0o755)

        def call(program, *arguments):
            command = [*as_user, str(bin_ / program), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=120)
            assert done.returncode == 0, done.stdout + done.stderr

        call("initdb", "-D", str(data), "-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync")
        settings = f"-c listen_addresses='' -c unix_socket_directories={folder} {options}"
        log = str(folder / "log")
        call("pg_ctl", "-D", str(data), "-w", "-l", log, "-o", settings, "start")
        try:
            yield folder
        finally:
            call("pg_ctl", "-D", str(data), "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def new_database(folder, name):
    """The URL of a new, empty database."""
    from pg8000.native import Connection

    connection = Connection("postgres", unix_sock=f"{folder}/.s.PGSQL.5432")
    connection.run(f'CREATE DATABASE "{name}"')
    connection.close()
    return f"postgresql://postgres@/{name}?host={folder}"
