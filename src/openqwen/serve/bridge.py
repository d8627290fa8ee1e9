"""The engine in a thread of its own: jobs go in by a queue, and what a step has made comes out in
one hop.
"""

import asyncio
import concurrent.futures
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

from openqwen.engine import Engine, Event, Request, Sampling, Stats
from openqwen.serve.errors import ApiError
from openqwen.serve.metrics import Metrics

Result = TypeVar("Result")
Asked = tuple[list[int], Sampling, int]  # a prompt, how to answer, how many answers
_Job = tuple[Callable[[], Any], "concurrent.futures.Future[Any]"]


class Answers:
    """The answers to one HTTP request, as events of any of them in the order in which they were
    made.
    """

    def __init__(self, bridge: "Bridge", count: int, seconds: float):
        self._bridge, self.open = bridge, count
        late = ApiError(408, f"The answer took longer than {seconds:g} seconds.", code="timeout")
        self._timer = bridge.loop.call_later(seconds, lambda: self.events.put_nowait(late))
        self.requests: list[Request] = []
        self.events: asyncio.Queue[tuple[int, Event] | ApiError] = asyncio.Queue()
        self.arrived = time.monotonic()
        self.last = dict.fromkeys(range(count), 0.0)  # when the newest token of each came

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """(number of the answer, event) until all are finished; ApiError when the engine fails."""
        left = self.open
        while left:
            item = await self.events.get()
            if isinstance(item, ApiError):
                raise item
            if item[1].finish_reason == "error":
                raise ApiError(500, "The engine could not go on with this answer.")
            left -= item[1].finish_reason is not None
            yield item
        self.open = 0

    def close(self) -> None:
        """Nobody wants the rest: what still runs is cancelled. To be called in any case."""
        self._timer.cancel()
        if self.open:
            self.open = 0
            self._bridge.cancel(self)


class Bridge:
    """Owns the engine's thread.

    Methods with a leading `_on` run on that thread, all others in the event loop.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        limit: int,
        seconds: float,
        failed: Callable[[], None],
    ):
        self.engine, self.metrics, self.limit, self.seconds, self._failed = (
            engine,
            metrics,
            limit,
            seconds,
            failed,
        )
        self.loop = asyncio.get_running_loop()
        self.paused = False
        self.fault: str | None = None  # why the thread has ended
        self.outstanding = 0  # answers that are being made or waited for
        self._recent: deque[float] = deque(maxlen=64)  # seconds that the latest answers took
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._owners: dict[int, tuple[Answers, int]] = {}  # by the identity of the engine's request
        self._thread = threading.Thread(target=self._on_thread, name="engine", daemon=True)
        self._thread.start()

    def _post(self, function: Callable[[], Result]) -> "asyncio.Future[Result]":
        """Run on the engine's thread, between two steps."""
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()
        if self.fault:
            future.set_exception(ApiError(503, f"{self.fault} The server is about to end."))
        else:
            self._inbox.put((function, future))
        return asyncio.wrap_future(future)

    async def call(self, function: Callable[[], Result]) -> Result:
        """The result of a function that uses the engine."""
        return await self._post(function)

    async def submit(
        self, asked: Sequence[Asked], priority: int = 0, adapter: str | None = None
    ) -> Answers:
        """Have answers made.

        OpenQwenError where the engine refuses one, ApiError 429 where too many wait already.
        """
        count = sum(n for _, _, n in asked)
        if self.outstanding + count > self.limit:
            seconds = sum(self._recent) / len(self._recent) if self._recent else 1.0
            message = (
                f"{self.outstanding} answers are being made or waited for, and {self.limit} are "
                "the limit."
            )
            raise ApiError(429, message, code="queue_full", retry=min(max(round(seconds), 1), 60))
        self.outstanding += count
        # What yields to others may have to wait for days.
        answers = Answers(self, count, self.seconds if priority >= 0 else 30 * 86_400.0)
        future = self._post(lambda: self._on_submit(answers, asked, priority, adapter))
        try:
            await asyncio.shield(future)
        except (
            asyncio.CancelledError
        ):  # the client left; the engine may take the requests all the same
            future.add_done_callback(
                lambda done: self._release(count) if done.exception() else answers.close()
            )
            raise
        except Exception:
            answers.close()
            self._release(count)
            raise
        return answers

    def cancel(self, answers: Answers) -> None:
        """Stop what still runs of these."""
        if not self.fault:
            future = self._post(lambda: sum(map(self._on_drop, answers.requests)))
            future.add_done_callback(self._cancelled)

    def _cancelled(self, done: "asyncio.Future[int]") -> None:
        if not done.exception():
            self._release(done.result())
            self.metrics.finished("abort", done.result())

    def _release(self, count: int) -> None:
        self.outstanding -= count

    async def pause(self, paused: bool) -> dict[str, Any]:
        """Hold all answers where they are, or let them go on."""
        await self.call(self.engine.pause if paused else self.engine.resume)
        self.paused = paused
        return {"paused": paused, "version": self.engine.version}

    def stop(self) -> None:
        """End the thread; returns when it has ended."""
        self._inbox.put(None)
        self._thread.join(timeout=60)

    def _on_submit(
        self, answers: Answers, asked: Sequence[Asked], priority: int, adapter: str | None
    ) -> None:
        try:
            for prompt, sampling, n in asked:
                for request in self.engine.submit_many(prompt, sampling, n, adapter, priority):
                    self._owners[id(request)] = (answers, len(answers.requests))
                    answers.requests.append(request)
        except Exception:
            for request in answers.requests:
                self._on_drop(request)
            raise

    def _on_drop(self, request: Request) -> bool:
        """Forget a request, and stop it where it still runs."""
        if self._owners.pop(id(request), None) is None:
            return False
        self.engine.cancel(request)
        return True

    def _on_thread(self) -> None:
        try:
            while self._on_turn():
                pass
        except BaseException as error:  # libraries in Rust panic with such
            self.fault = f"The engine has failed: {type(error).__name__}."
            self.loop.call_soon_threadsafe(self._die)
            raise  # threading prints the traceback

    def _on_turn(self) -> bool:
        """Do what is asked, then one step, then one hop into the event loop; False at the end."""
        jobs = [] if self.engine.busy else [self._inbox.get()]
        while not self._inbox.empty():
            jobs.append(self._inbox.get())
        for job in jobs:
            if job is None:
                return False
            function, future = job
            if future.set_running_or_notify_cancel():  # else whoever asked is gone
                try:
                    future.set_result(function())
                except Exception as error:
                    future.set_exception(error)
                except BaseException as error:  # a panic in Rust, which nobody else would catch
                    future.set_exception(RuntimeError(repr(error)))
        events: list[tuple[Answers, int, Event]] = []
        if self.engine.busy:
            for event in self.engine.step():
                owner = self._owners.get(id(event.request))
                if owner is not None:
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
                self._recent.append(now - answers.arrived)
                self._release(1)
            answers.last[number] = now
            answers.events.put_nowait((number, event))

    def _die(self) -> None:
        for answers in {id(a): a for a, _ in self._owners.values()}.values():
            answers.events.put_nowait(ApiError(500, self.fault or ""))
        while not self._inbox.empty():
            job = self._inbox.get()
            if job and job[1].set_running_or_notify_cancel():
                job[1].set_exception(ApiError(503, self.fault or ""))
        self._failed()
