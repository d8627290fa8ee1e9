"""Worker processes that share work, on this machine or on a Ray cluster.

    make()   →  one object in each worker: an engine, or a function of a chunk of documents
    calls    →  a worker; what a worker that died was asked is asked of another one
    results  →  in the order of the items

The work must be a pure function of what it is given. Then the results are the same with any number
of workers. Importing this file loads neither Ray nor torch.
"""

import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from multiprocessing import connection
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar

from pydantic import Field

from openqwen.support.command import pip_install
from openqwen.support.errors import OpenQwenError
from openqwen.support.progress import notice
from openqwen.support.settings import Settings

Item = TypeVar("Item")
Result = TypeVar("Result")
WorkKind = Literal["single", "processes", "ray"]

WAIT = 0.2  # seconds of one wait: between two of them Python handles signals such as Ctrl-C
_DEATHS = 3  # of workers at the same work: then the work is the reason
_OBJECTS = 2 * 10**8  # bytes of Ray's object store, where Ray is started here


class WorkersConfig(Settings):
    """The worker processes, where there are any."""

    count: int | None = Field(
        None,
        ge=1,
        description="number of workers; by default engines get one for each GPU or, without GPUs, "
        "for each machine, and other work gets one for each CPU",
    )
    cpus: int | None = Field(
        None, ge=1, description="CPUs of each worker; by default as many as there are for all"
    )
    gpus: float | None = Field(
        None, ge=0, description="GPUs of each worker, by Ray; by default 1 for engines, if any"
    )
    address: str = Field(
        "",
        description="the Ray cluster, such as 10.0.0.1:6379 or auto; by default RAY_ADDRESS, or, "
        "if that is not set, Ray is started on this machine alone",
    )


class WorkerDied(Exception):
    """A worker ended before it answered: it was killed, or its machine was lost."""


class Workers:
    """A number of workers, to be closed or used in a `with` block.

    Args:
        make: makes the object of each worker, when it is first called. A function of a module, or
            a `functools.partial` of one, since it is sent to the workers.
        kind: where the workers run.
        config: how many there are, and what each gets.
        engines: whether they are engines, which run on GPUs or on a machine's CPUs together.

    Raises:
        OpenQwenError: Ray is missing or not reached, or there is no room for the workers.
    """

    def __init__(
        self, make: Callable[[], Any], kind: WorkKind, config: WorkersConfig, engines: bool = False
    ):
        self._all: list[_Process | _Actor] = []
        self._started: list[Future[Any]] = []
        self._stack = ExitStack()
        self._start: Callable[[], _Process | _Actor]
        if kind == "ray":
            ray = self._stack.enter_context(joined_ray(config))
            machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        else:
            machines = [{"CPU": _cpus(config)}]
        try:
            count, cpus, gpus = sizes(config, machines, engines)
            held = (make, version("openqwen"), cpus)
            if kind == "ray":
                needs = {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}
                actor = ray.remote(_Held).options(**needs)
                self._start = lambda: _Actor(ray, actor.remote(*held))
            else:
                self._start = lambda: _Process(held)
            for _ in range(count):
                self._all.append(self._start())
                self._started.append(self._all[-1].call("", ()))
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._all)

    def ready(self, place: int) -> bool:
        """Whether a worker has started. On a busy cluster it may have to wait for room."""
        return self._started[place].done()

    def wait_for_one(self) -> None:
        """Wait a moment for a worker that has started."""
        wait(self._started, WAIT, FIRST_COMPLETED)

    def call(self, place: int, method: str, *arguments: Any) -> "WorkerCall":
        """Call a method of a worker's object, after the calls before."""
        worker = self._all[place]
        return WorkerCall(place, worker, worker.call(method, arguments))

    def replace(self, call: "WorkerCall", why: object) -> None:
        """Start another worker in place of one that died in this call, if that is not done."""
        if self._all[call.place] is call.worker:
            notice(f"a worker died and is replaced: {why}", f"worker {call.place}")
            call.worker.close()
            self._all[call.place] = self._start()
            self._started[call.place] = self._all[call.place].call("", ())

    def close(self) -> None:
        """End all workers, and Ray if it was started here. A second call does nothing."""
        while self._all:
            self._all.pop().close()
        self._stack.close()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class WorkerCall:
    """A call of a worker. place: of the worker."""

    def __init__(self, place: int, worker: "_Process | _Actor", future: "Future[Any]"):
        self.place, self.worker, self.future = place, worker, future

    @property
    def death(self) -> WorkerDied | None:
        """How the worker died, if it did."""
        error = self.future.exception() if self.future.done() else None
        ray: Any = sys.modules.get("ray")
        died = isinstance(error, BrokenExecutor)
        if ray and isinstance(error, ray.exceptions.RayError):
            died = not isinstance(error, ray.exceptions.RayTaskError)  # that the method raised
        return WorkerDied(_last_line(error)) if died else None

    def result(self) -> Any:
        """The result of the method, or its exception, where the call is done."""
        if death := self.death:
            raise death
        try:
            return self.future.result()
        except OpenQwenError as error:  # Ray's copy of it repeats the worker's traceback
            raise getattr(error, "cause", error) from None


def _last_line(error: object) -> str:
    """What Ray's long messages end with: the cause."""
    return str(error).strip().splitlines()[-1].strip()[:300]


class DeathCount:
    """How often workers died at some work."""

    def __init__(self, where: str):
        self._where, self._count = where, 0

    def add(self, death: WorkerDied) -> None:
        """Count a death. Raises OpenQwenError where there were too many."""
        self._count += 1
        if self._count == _DEATHS:
            what = f"{_DEATHS} workers died at the same work: {death}"
            do = "look whether the memory is enough, or take fewer workers"
            raise OpenQwenError(what, self._where, do)


def map_in_order(
    make: Callable[[], Callable[[Item], Result]],
    items: Iterable[Item],
    kind: WorkKind = "single",
    config: WorkersConfig | None = None,
    ahead: int = 2,
) -> Iterator[Result]:
    """Apply a function to each item, and yield the results in the order of the items.

    Args:
        make: returns the function; called once in each worker, see `Workers`.
        items: read by this process, when they are needed. Items of a dead worker are done again.
        ahead: most items, for each worker, that are at work or done and not yet yielded.

    Raises:
        OpenQwenError: the workers of an item died several times.
        Exception: of the function, when it is the item's turn.
    """
    if kind == "single":
        yield from map(make(), items)
        return
    with Workers(make, kind, config or WorkersConfig()) as workers:
        waiting, calls = enumerate(items), deque[RetriedCall]()
        while True:
            while len(calls) < ahead * len(workers):
                busy = Counter(one.call.place for one in calls if not one.call.future.done())
                place = min(_ready(workers), key=busy.__getitem__)
                if busy[place] >= ahead:  # what is left is for workers that still start
                    break
                if (following := next(waiting, None)) is None:
                    break
                number, item = following
                calls.append(RetriedCall(workers, place, f"item {number}", "__call__", item))
            if not calls:
                return
            if calls[0].done():
                yield calls.popleft().wait()
            else:
                unfinished = [one.call.future for one in calls if not one.done()]
                wait(unfinished, WAIT, FIRST_COMPLETED)


def _ready(workers: Workers) -> list[int]:
    """The places of the workers that have started; waits until there is one."""
    while not (places := [n for n in range(len(workers)) if workers.ready(n)]):
        workers.wait_for_one()
    return places


class RetriedCall:
    """A call that is made again where its worker dies. where: the work, for an error."""

    def __init__(self, workers: Workers, place: int, where: str, method: str, *arguments: Any):
        self._workers, self._deaths = workers, DeathCount(where)
        self._what = (method, *arguments)
        self.call = workers.call(place, *self._what)

    def done(self) -> bool:
        """Whether there is a result. If the worker died, another one is asked.

        Raises:
            OpenQwenError: several workers died.
        """
        if death := self.call.death:
            self._deaths.add(death)
            self._workers.replace(self.call, death)
            self.call = self._workers.call(_ready(self._workers)[0], *self._what)
        return self.call.future.done()

    def wait(self) -> Any:
        """The result, when it is there."""
        while not self.done():
            wait([self.call.future], WAIT)
        return self.call.result()


def sizes(
    config: WorkersConfig, machines: Sequence[Mapping[str, float]], engines: bool
) -> tuple[int, int, float]:
    """The number of workers, and the CPUs and GPUs of each. machines: "CPU" and "GPU" of each.

    Raises:
        OpenQwenError: the machines have no room for them.
    """
    cpus_of = [int(machine.get("CPU", 0)) for machine in machines]
    gpus_of = [machine.get("GPU", 0.0) for machine in machines]

    def room(cpus: int) -> int:
        fit = [c // cpus if c else 0 for c in cpus_of]
        return int(sum(min(n, g // gpus) if gpus else n for n, g in zip(fit, gpus_of)))

    gpus = config.gpus
    if gpus is None:
        gpus = 1.0 if engines and any(gpus_of) else 0.0
    count = config.count
    if count is None:
        per_machine = sum(g // gpus for g in gpus_of) if gpus else len(machines)
        count = max(1, int(per_machine if engines else sum(cpus_of)))
    largest = range(max(cpus_of), 0, -1)
    cpus = config.cpus or next((cpus for cpus in largest if room(cpus) >= count), 1)
    if room(cpus) < count:
        what = f"There is no room for {count} workers of {cpus} CPUs and {gpus:g} GPUs: "
        what += f"the cluster has machines of {cpus_of} CPUs and {gpus_of} GPUs."
        raise OpenQwenError(what, "workers", "give a smaller count, or fewer cpus or gpus of each")
    return count, cpus, gpus


def _cpus(config: WorkersConfig) -> int:
    """The CPUs of this machine, or what is asked of it, where workers are to share them."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(here or 1, (config.count or 1) * (config.cpus or 1))


class _Held:
    """What a worker process holds: the object, from the first call on."""

    def __init__(self, make: Callable[[], Any], version: str, threads: int):
        self._make, self._version, self._threads, self._object = make, version, threads, None

    def call(self, method: str, arguments: Sequence[Any]) -> Any:
        """Call a method of the object; none: tell that the worker has started."""
        if not method:
            return None
        if self._object is None:
            os.environ["OMP_NUM_THREADS"] = str(self._threads)
            if (here := version("openqwen")) != self._version:
                what = f"A worker has OpenQwen {here}, and the program that asks {self._version}."
                do = "install the same version on all machines"
                raise OpenQwenError(what, socket.gethostname(), do)
            self._object = self._make()
        return getattr(self._object, method)(*arguments)


class _Process:
    """A process of this machine. held: the arguments of `_Held`."""

    def __init__(self, held: tuple[Callable[[], Any], str, int]):
        spawn = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
        self._pool = ProcessPoolExecutor(1, spawn, _begin, held)
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(held[-1])  # read when libraries are loaded
        try:
            self.call("", ())  # starts the process
        finally:
            del os.environ["OMP_NUM_THREADS"]
            if before is not None:
                os.environ["OMP_NUM_THREADS"] = before

    def call(self, method: str, arguments: Sequence[Any]) -> "Future[Any]":
        try:
            return self._pool.submit(_call, method, arguments)
        except BrokenExecutor as error:
            future: Future[Any] = Future()
            future.set_exception(error)
            return future

    def close(self) -> None:
        """End the process, whatever it does."""
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()


_held: _Held | None = None  # in a worker process of this machine


def _begin(make: Callable[[], Any], version: str, threads: int) -> None:
    global _held
    _held = _Held(make, version, threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _call(method: str, arguments: Sequence[Any]) -> Any:
    assert _held is not None
    return _held.call(method, arguments)


class _Actor:
    """A process of a Ray cluster."""

    def __init__(self, ray: Any, actor: Any):
        self._ray, self._actor = ray, actor

    def call(self, method: str, arguments: Sequence[Any]) -> "Future[Any]":
        future: Future[Any] = self._actor.call.remote(method, arguments).future()
        return future

    def close(self) -> None:
        """End the process, whatever it does."""
        self._ray.kill(self._actor)


@contextmanager
def joined_ray(config: WorkersConfig) -> Iterator[Any]:
    """The module `ray`, joined to a cluster, which is started here if none is named."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = config.address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local" and "ray" not in sys.modules:  # read when Ray is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # it listens on all interfaces
    try:
        import ray
    except ImportError:
        do = pip_install("openqwen[ray]")
        raise OpenQwenError("Ray is not installed.", "engine ray", do) from None
    if ray.is_initialized() and not _joined.users:  # by the caller
        yield ray
        return
    if not _joined.users:
        _joined.end = _start_ray(ray, address, config)
    _joined.users += 1
    try:
        yield ray
    finally:  # the last that uses it ends it, whoever was first
        _joined.users -= 1
        if not _joined.users:
            _joined.end.close()


@dataclass
class JoinedRay:
    """What ends Ray, which this process joined, and how many use it."""

    users: int = 0
    end: ExitStack = field(default_factory=ExitStack)


_joined = JoinedRay()


def _start_ray(ray: Any, address: str, config: WorkersConfig) -> ExitStack:
    """Join a cluster, or start one; returns what ends it."""
    with ExitStack() as stack:
        here: dict[str, Any] = {}
        if address == "local":
            # In /tmp, since the path of a socket must be short.
            folder = TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
            here = {"_temp_dir": stack.enter_context(folder), "object_store_memory": _OBJECTS}
            here |= {"num_cpus": _cpus(config), "include_dashboard": False}
        terminated = signal.getsignal(signal.SIGTERM)
        stack.callback(ray.shutdown)
        for left in (2, 1, 0):
            try:
                if found := re.fullmatch(r"([^:/]+):(\d+)", address):  # Ray tries for minutes
                    socket.create_connection((found[1], int(found[2])), timeout=10).close()
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **here)
                break
            except Exception as error:  # Ray raises that very class, too
                ray.shutdown()
                if here and left:  # its parts give up on each other where a machine is busy
                    continue
                what = f"Ray is not reached: {_last_line(error)}"
                raise OpenQwenError(what, address, "check it by `ray status`") from None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminated)  # Ray has put its own in place
        return stack.pop_all()
