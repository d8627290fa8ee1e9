"""Answers that come one by one as they end, where `generate` returns all of a batch at once.

    with open_lane(generator) as lane:
        lane.submit("a", prompt, sampling, seed)
        for tag, answer in lane.wait(): ...

Importing this file does not load torch.
"""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import Hashable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from openqwen.engine.generator import Generator, Output, Prompt, Sampling
from openqwen.support.errors import OpenQwenError

if TYPE_CHECKING:
    from openqwen.engine.endpoint import Endpoint
    from openqwen.engine.engine import Engine
    from openqwen.engine.request import Request

Ended = list[tuple[Any, Output | OpenQwenError]]  # (the tag that was given, answer or error)
_WAIT = 0.2  # seconds of one wait: between two of them Python handles signals such as Ctrl-C


class Lane:
    """Requests to one generator; closing it cancels those that are open.

    This one asks by `generate`, one after the other. `Engine` and `Endpoint` have lanes that work
    on all open requests at once.
    """

    def __init__(self, generator: Generator):
        self._generator = generator
        self._waiting: deque[tuple[Hashable, Prompt, Sampling, int]] = deque()

    @property
    def open(self) -> int:
        """Number of requests without an answer so far."""
        return len(self._waiting)

    def submit(self, tag: Hashable, prompt: Prompt, sampling: Sampling, seed: int) -> None:
        """Send a request. tag: what `wait` names it by."""
        self._waiting.append((tag, prompt, sampling, seed))

    def wait(self) -> Ended:
        """Answers, or the error of a request, since the last call; none after a short wait."""
        tag, prompt, sampling, seed = self._waiting.popleft()
        try:
            return [(tag, self._generator.generate([prompt], sampling, seeds=[seed])[0])]
        except OpenQwenError as error:
            return [(tag, error)]

    def close(self) -> None:
        """Cancel all open requests."""
        self._waiting.clear()

    def __enter__(self) -> "Lane":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_lane(generator: Generator) -> Lane:
    """The lane of a generator."""
    make: Any = getattr(generator, "lane", None)
    lane: Lane = make() if make else Lane(generator)
    return lane


class EngineLane(Lane):
    """Requests in this process. No other caller may step the engine meanwhile."""

    def __init__(self, engine: "Engine"):
        self._engine = engine
        self._tags: dict[Request, Hashable] = {}
        self._refused: Ended = []

    @property
    def open(self) -> int:
        return len(self._tags) + len(self._refused)

    def submit(self, tag: Hashable, prompt: Prompt, sampling: Sampling, seed: int) -> None:
        try:
            self._tags[self._engine.submit(prompt, sampling, seed)] = tag
        except OpenQwenError as error:
            self._refused.append((tag, error))

    def wait(self) -> Ended:
        ended, self._refused = self._refused, []
        for event in self._engine.step() if self._tags else ():
            if event.finish_reason and event.request in self._tags:
                ended.append((self._tags.pop(event.request), event.request))
        return ended

    def close(self) -> None:
        self._engine._discard(list(self._tags))


class EndpointLane(Lane):
    """Requests to a server. An event loop in a thread of its own sends them and waits."""

    def __init__(self, endpoint: "Endpoint"):
        self._endpoint, self._client = endpoint, endpoint.client()
        self._tags: dict[Future[Output], Hashable] = {}
        self._ended: queue.SimpleQueue[Future[Output]] = queue.SimpleQueue()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    @property
    def open(self) -> int:
        return len(self._tags)

    def submit(self, tag: Hashable, prompt: Prompt, sampling: Sampling, seed: int) -> None:
        answer = self._endpoint.answer(self._client, prompt, sampling, seed)
        future = asyncio.run_coroutine_threadsafe(answer, self._loop)
        self._tags[future] = tag
        future.add_done_callback(self._ended.put)

    def wait(self) -> Ended:
        ended: Ended = []
        try:
            future = self._ended.get(timeout=_WAIT)
            while True:
                ended.append((self._tags.pop(future), _result(future)))
                future = self._ended.get_nowait()
        except queue.Empty:
            return ended

    def close(self) -> None:
        for future in self._tags:
            future.cancel()
        asyncio.run_coroutine_threadsafe(self._client.aclose(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _result(future: Future[Output]) -> Output | OpenQwenError:
    try:
        return future.result()
    except OpenQwenError as error:
        return error
