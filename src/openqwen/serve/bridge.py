"""The engine in a thread of its own.

Jobs go in by a queue. What a step of the engine has made goes to the event loop in one call.
"""

import asyncio
import concurrent.futures
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from openqwen.engine import Engine, Event, Request, Sampling, Stats
from openqwen.http.errors import ApiError
from openqwen.http.limits import ConcurrencyLimit
from openqwen.serve.metrics import Metrics

Result = TypeVar("Result")
Prompted = tuple[list[int], Sampling, int]  # a prompt, how to answer it, number of answers
_Job = tuple[Callable[[], Any], "concurrent.futures.Future[Any]"]
_BATCH_SECONDS = 30 * 86_400.0  # time limit where an answer yields to all others


class Answers:
    """The answers to one HTTP request: their events, in the order in which they were made."""

    def __init__(self, bridge: "Bridge", count: int, seconds: float):
        self._bridge, self._unfinished = bridge, count
        late = ApiError(408, f"The answer took longer than {seconds:g} seconds.", code="timeout")
        self._timer = bridge.loop.call_later(seconds, lambda: self.events.put_nowait(late))
        self.requests: list[Request] = []
        self.events: asyncio.Queue[tuple[int, Event] | ApiError] = asyncio.Queue()
        self.arrived = time.monotonic()
        self.last = dict.fromkeys(range(count), 0.0)  # when the newest token of each arrived

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """(number of the answer, event) until all are finished; ApiError if the engine fails."""
        unfinished = self._unfinished
        while unfinished:
            item = await self.events.get()
            if isinstance(item, ApiError):
                raise item
            if item[1].finish_reason == "error":
                raise ApiError(500, "The engine could not continue this answer.")
            unfinished -= item[1].finish_reason is not None
            yield item
        self._unfinished = 0

    def close(self) -> None:
        """Cancel what still runs; must be called in any case."""
        self._timer.cancel()
        if self._unfinished:
            self._unfinished = 0
            self._bridge.cancel(self)


class Bridge:
    """Runs the engine in a thread of its own.

    Methods that begin with `_on` run in that thread, all others in the event loop.

    Args:
        engine: the engine; no other thread may use it.
        metrics: where events and statistics are counted.
        limit: most answers in progress or waiting.
        seconds: time limit of one answer.
        on_failure: called in the event loop when the engine has failed.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        limit: int,
        seconds: float,
        on_failure: Callable[[], None],
    ):
        self.engine, self.metrics, self.seconds = engine, metrics, seconds
        self._report_failure = on_failure
        self.loop = asyncio.get_running_loop()
        self.paused = False
        self.fault: str | None = None  # why the thread has ended
        self._places = ConcurrencyLimit(limit)
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._owners: dict[int, tuple[Answers, int]] = {}  # by id() of the engine's request
        self._thread = threading.Thread(target=self._on_thread, name="engine", daemon=True)
        self._thread.start()

    def _post(self, function: Callable[[], Result]) -> "asyncio.Future[Result]":
        """Have a function called in the engine's thread, between two steps."""
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        if self.fault:
            future.set_exception(ApiError(503, f"{self.fault} The server is shutting down."))
        else:
            self._inbox.put((function, future))
        return asyncio.wrap_future(future)

    async def call(self, function: Callable[[], Result]) -> Result:
        """The result of a function that uses the engine."""
        return await self._post(function)

    async def submit(
        self, prompts: Sequence[Prompted], priority: int = 0, adapter: str | None = None
    ) -> Answers:
        """Submit prompts to the engine.

        Raises OpenQwenError where the engine refuses one, ApiError 429 where too many wait.
        """
        count = sum(n for _, _, n in prompts)
        self._places.take(count)
        answers = Answers(self, count, self.seconds if priority >= 0 else _BATCH_SECONDS)
        future = self._post(lambda: self._on_submit(answers, prompts, priority, adapter))

        def submitted_too_late(done: "asyncio.Future[None]") -> None:
            if done.exception():
                self._places.release(count)
            else:
                answers.close()

        try:
            await asyncio.shield(future)
        except asyncio.CancelledError:  # the client left; the engine may take the requests still
            future.add_done_callback(submitted_too_late)
            raise
        except Exception:
            answers.close()
            self._places.release(count)
            raise
        return answers

    def cancel(self, answers: Answers) -> None:
        """Cancel what still runs of these."""
        if not self.fault:
            future = self._post(lambda: sum(map(self._on_drop, answers.requests)))
            future.add_done_callback(self._cancelled)

    def _cancelled(self, done: "asyncio.Future[int]") -> None:
        if not done.exception():
            self._places.release(done.result())
            self.metrics.finished("abort", done.result())

    async def pause(self, paused: bool) -> dict[str, Any]:
        """Hold all answers where they are, or continue them."""
        await self.call(self.engine.pause if paused else self.engine.resume)
        self.paused = paused
        return {"paused": paused, "version": self.engine.version}

    def stop(self) -> None:
        """End the thread and wait for its end."""
        self._inbox.put(None)
        self._thread.join(timeout=60)

    def _on_submit(
        self, answers: Answers, prompts: Sequence[Prompted], priority: int, adapter: str | None
    ) -> None:
        try:
            for prompt, sampling, n in prompts:
                for request in self.engine.submit_many(prompt, sampling, n, adapter, priority):
                    self._owners[id(request)] = (answers, len(answers.requests))
                    answers.requests.append(request)
        except Exception:
            for request in answers.requests:
                self._on_drop(request)
            raise

    def _on_drop(self, request: Request) -> bool:
        """Cancel a request; returns whether it was still running."""
        if self._owners.pop(id(request), None) is None:
            return False
        self.engine.cancel(request)
        return True

    def _on_thread(self) -> None:
        try:
            while self._on_iteration():
                pass
        except BaseException as error:  # not Exception alone: libraries in Rust panic
            self.fault = f"The engine has failed: {type(error).__name__}."
            self.loop.call_soon_threadsafe(self._fail)
            raise  # threading prints the traceback

    def _on_iteration(self) -> bool:
        """Run the waiting jobs and one step, and send its events; returns False at the end."""
        jobs = [] if self.engine.busy else [self._inbox.get()]
        while not self._inbox.empty():
            jobs.append(self._inbox.get())
        for job in jobs:
            if job is None:
                return False
            _run(job)
        events: list[tuple[Answers, int, Event]] = []
        if self.engine.busy:
            for event in self.engine.step():
                owner = self._owners.get(id(event.request))
                if owner is None:
                    continue
                events.append((*owner, event))
                if event.finish_reason:
                    del self._owners[id(event.request)]
        self.loop.call_soon_threadsafe(self._deliver, events, self.engine.stats())
        return True

    def _deliver(self, events: list[tuple[Answers, int, Event]], stats: Stats) -> None:
        self.metrics.update(stats)
        now = time.monotonic()
        for answers, number, event in events:
            self.metrics.observe(answers, number, event, now)
            if event.finish_reason:
                self._places.release(1, now - answers.arrived)
            answers.last[number] = now
            answers.events.put_nowait((number, event))

    def _fail(self) -> None:
        """End all answers and jobs by an error, since the engine has failed."""
        for answers in {id(a): a for a, _ in self._owners.values()}.values():
            answers.events.put_nowait(ApiError(500, self.fault or ""))
        while not self._inbox.empty():
            job = self._inbox.get()
            if job and job[1].set_running_or_notify_cancel():
                job[1].set_exception(ApiError(503, self.fault or ""))
        self._report_failure()


def _run(job: _Job) -> None:
    """Call a job's function, unless its caller has gone, and set its future."""
    function, future = job
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
    except BaseException as error:  # a panic in Rust, which no caller would catch
        future.set_exception(RuntimeError(repr(error)))
