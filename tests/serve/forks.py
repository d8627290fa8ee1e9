"""`openqwen` in processes of their own that begin with everything imported: seconds of importing
are saved for each.
"""

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import termios

os.environ.setdefault("OMP_NUM_THREADS", "1")
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["openqwen.cli", "openqwen.serve.server", "openqwen.serve.terminal"]
)


class Fork:
    """As much of a `subprocess.Popen` of `openqwen ARGUMENTS` as the tests use."""

    def __init__(self, arguments, environment, inside, outside):
        """inside: the file to read from, None for nothing; a terminal becomes its own. outside: to
        write to.
        """
        files = [
            None if file is None else multiprocessing.connection.Connection(os.dup(file))
            for file in (inside, outside)
        ]
        self._process = _CONTEXT.Process(
            target=_begin, args=(list(arguments), environment, *files), daemon=True
        )
        self._process.start()
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode

    def wait(self, seconds=None):
        self._process.join(seconds)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", seconds)
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self._process.kill()


def _begin(arguments, environment, inside, outside):
    os.environ.clear()
    os.environ.update(environment)
    os.setsid()
    if inside is not None:
        os.dup2(inside.fileno(), 0)
        sys.stdin = os.fdopen(0, encoding="utf-8")
        if os.isatty(0):
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches it
    for number in (1, 2):
        os.dup2(outside.fileno(), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, "utf-8") for number in (1, 2))
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a suite that runs in the background has it ignored
    from openqwen.cli import main

    sys.exit(main(arguments))
