"""A generator that asks a server with OpenAI's API.

Such servers are OpenQwen's own, vLLM, SGLang, llama.cpp and hosted services.
"""

import asyncio
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx

from openqwen.engine.generator import Generator, Output, Prompt, Sampling
from openqwen.engine.lanes import EndpointLane
from openqwen.engine.openai_api import (
    ApiCall,
    Json,
    answer_call,
    read_answer,
    read_score,
    score_call,
)
from openqwen.engine.seeds import seed_of
from openqwen.support.errors import OpenQwenError, disk_errors, located
from openqwen.support.files import parse_json
from openqwen.support.progress import Progress, notice
from openqwen.support.retry import backoff, retry_after

Result = TypeVar("Result")

_GREEDY = Sampling()
_LONGEST_RETRY_AFTER = 600.0  # seconds that a server may ask to wait
_CONNECT = 10.0  # seconds
_LARGEST = 2**28  # bytes of a response
_WHAT_TO_DO = {
    401: "give api_key, or set OPENAI_API_KEY",
    403: "give api_key, or set OPENAI_API_KEY",
    404: "check the base URL, which often ends in /v1, and the model's name",
}


class _AttemptError(Exception):
    """An attempt failed.

    retry: whether another may succeed. wait: seconds that the server asks to wait.
    """

    def __init__(
        self, what: str, retry: bool = True, wait: float | None = None, do: str | None = None
    ):
        super().__init__(what)
        self.retry, self.wait, self.do = retry, wait, do


class Endpoint(Generator):
    """A model behind a server with OpenAI's API.

    Each prompt is one request. On connection errors, time-outs, status 408, 429 and 5xx, or as the
    server says (Retry-After, x-should-retry), it is sent again after a wait, which doubles each
    time.

    Outputs hold token ids if the server knows `return_token_ids` (vLLM's field), and
    log-probabilities if it returns them; otherwise these lists are empty. Servers read control
    tokens in a prompt that is a text; `Engine` does not. A server that does not know a field of the
    request may ignore it, which cannot be noticed here; if it refuses an optional field by name,
    the field is left out.

    Args:
        url: the base URL, such as http://127.0.0.1:8000/v1.
        model: the model's name at the server.
        api_key: by default the environment variable OPENAI_API_KEY.
        concurrency: most requests at once.
        timeout: most seconds of one attempt, from connecting to the last byte.
        retries: most attempts of a request after the first; 6 cover about half a minute.
        cache: a folder that keeps each response. A later call reads the response from there if
            URL, model, prompt, sampling and, unless greedy, seed are the same.

    Raises:
        OpenQwenError: an argument cannot be used.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api_key: str | None = None,
        concurrency: int = 32,
        timeout: float = 600.0,
        retries: int = 6,
        cache: str | Path | None = None,
    ):
        for name, good, wanted in (
            ("model", bool(model), "the name of a model of the server"),
            ("concurrency", concurrency >= 1, "1 or more"),
            ("timeout", 0 < timeout < math.inf, "seconds above 0"),
            ("retries", retries >= 0, "0 or more"),
        ):
            if not good:
                what = f"{name} cannot be {locals()[name]!r}."
                raise OpenQwenError(what, where=f"Endpoint, {name}", do=f"give {wanted}")
        self.url, self.model = _checked_url(url), model
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.cache = None if cache is None else _folder(Path(cache))
        self._key = _checked_key(os.environ.get("OPENAI_API_KEY") if api_key is None else api_key)
        self._refused: set[str] = set()  # optional fields that the server does not take

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling = _GREEDY,
        seeds: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[Output]:
        """Answer every prompt, in order; see `Generator.generate`.

        When a request fails for good, or on an exception such as Ctrl-C, all others are cancelled.
        """
        calls = []
        for number, prompt in enumerate(prompts):
            seed = seed_of(sampling.seed, number) if seeds is None else seeds[number]
            with located(f"prompt {number}"):
                calls.append(self._calls(prompt, sampling, seed))
        return _run_in_thread(self._answer_all(calls, progress))

    def lane(self) -> EndpointLane:
        """Requests whose answers come one by one."""
        return EndpointLane(self)

    def client(self) -> httpx.AsyncClient:
        """The connections of one event loop to the server."""
        limits = httpx.Limits(max_connections=self.concurrency)
        # `_attempt` limits the time of an attempt; only connecting has a limit here.
        timeout = httpx.Timeout(None, connect=min(_CONNECT, self.timeout))
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return httpx.AsyncClient(headers=headers, timeout=timeout, limits=limits)

    async def answer(
        self, client: httpx.AsyncClient, prompt: Prompt, sampling: Sampling, seed: int
    ) -> Output:
        """Answer one prompt through the connections of `client`; see `generate`."""
        return await self._answer(client, *self._calls(prompt, sampling, seed))

    def _calls(
        self, prompt: Prompt, sampling: Sampling, seed: int
    ) -> tuple[ApiCall, ApiCall | None]:
        """The request for an answer, and that for the prompt's log-probabilities if wanted."""
        answer = answer_call(prompt, sampling, seed, self.model)
        scored = sampling.prompt_logprobs is not None
        return answer, score_call(prompt, self.model) if scored else None

    async def _answer_all(
        self, calls: list[tuple[ApiCall, ApiCall | None]], progress: Progress | None
    ) -> list[Output]:
        outputs = [Output() for _ in calls]
        queue = iter(enumerate(calls))  # all workers take from this one

        async def work() -> None:
            for number, (answer, score) in queue:
                with located(f"prompt {number}"):
                    outputs[number] = await self._answer(client, answer, score)
                if progress:
                    progress.advance(1)

        async with self.client() as client:
            count = min(self.concurrency, len(calls))
            workers = [asyncio.create_task(work()) for _ in range(count)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return outputs

    async def _answer(
        self, client: httpx.AsyncClient, answer: ApiCall, score: ApiCall | None
    ) -> Output:
        output = await self._fetch(client, answer, read_answer)
        prompt = answer.body.get("prompt")
        if isinstance(prompt, list) and not output.prompt_ids:
            output.prompt_ids = list(prompt)
        if score:
            output.prompt_logprobs = await self._fetch(client, score, read_score)
        return output

    async def _fetch(
        self, client: httpx.AsyncClient, call: ApiCall, read: Callable[[Json], Result]
    ) -> Result:
        """The response, from the cache if it is there, as `read` converts it."""
        path = self.cache and self.cache / self._file_name(call)
        if path:
            with suppress(OSError, ValueError):  # missing or damaged: send the request
                return read(parse_json(path.read_bytes()))
        response = await self._send(client, call)
        try:
            result = read(response)
        except ValueError as error:
            raise OpenQwenError(f"The response cannot be used: {error}.", self._at(call)) from None
        # An answer that ended in an error may succeed next time.
        if path and getattr(result, "finish_reason", None) != "error":
            _write(path, response)
        return result

    def _file_name(self, call: ApiCall) -> str:
        key = json.dumps([self.url, call.path, call.body], sort_keys=True)
        return hashlib.sha256(key.encode()).hexdigest() + ".json"

    def _at(self, call: ApiCall) -> str:
        return self.url + call.path

    async def _send(self, client: httpx.AsyncClient, call: ApiCall) -> Json:
        """The response, after as many attempts as are needed and allowed."""
        for attempt in range(self.retries + 1):
            try:
                return await self._attempt(client, call)
            except _AttemptError as error:
                if not error.retry or attempt == self.retries:
                    after = f" (attempt {attempt + 1})" if attempt else ""
                    raise OpenQwenError(f"{error}{after}", self._at(call), error.do) from None
                await asyncio.sleep(backoff(attempt, error.wait))
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, client: httpx.AsyncClient, call: ApiCall) -> Json:
        """The response of one attempt, without optional fields that the server refuses."""
        while True:
            left_out = self._refused & call.optional
            body = {name: value for name, value in call.body.items() if name not in left_out}
            try:
                async with asyncio.timeout(self.timeout):
                    response, raw = await self._post(client, call, body)
            except TimeoutError:
                what = f"The server did not answer within {self.timeout:g} seconds."
                raise _AttemptError(what, do="give a larger timeout") from None
            except httpx.RequestError as error:
                what = f"The connection failed: {type(error).__name__} {error}".rstrip() + "."
                raise _AttemptError(what, do="check that the server runs at this URL") from None
            if response.is_success:
                return self._completion(raw)
            message = self._message(raw)
            if response.status_code not in (400, 422) or not self._leave_out(call, body, message):
                raise _failure(response, message)

    async def _post(
        self, client: httpx.AsyncClient, call: ApiCall, body: Json
    ) -> tuple[httpx.Response, bytes]:
        content = json.dumps(body).encode()
        raw = bytearray()
        async with client.stream("POST", self._at(call), content=content) as response:
            async for part in response.aiter_bytes():
                raw += part
                if len(raw) > _LARGEST:
                    what = f"The response is larger than {_LARGEST >> 20} MiB."
                    raise _AttemptError(what, retry=False, do="give a smaller max_tokens")
        return response, bytes(raw)

    def _leave_out(self, call: ApiCall, body: Json, message: str) -> bool:
        """Whether a refusal names optional fields that were sent; later calls leave them out."""
        sent = call.optional & body.keys()
        named = {name for name in sent if re.search(rf"\b{name}\b", message)}
        if new := named - self._refused:
            notice(f"the server does not take {', '.join(sorted(new))}", self.url)
        self._refused |= named
        return bool(named)

    def _completion(self, raw: bytes) -> Json:
        """The object in a response. One that is damaged, or an error, is worth another attempt."""
        try:
            value = parse_json(raw)
        except ValueError as error:
            raise _AttemptError(f"The response is not JSON: {error}.") from None
        if not isinstance(value, dict) or not value.get("choices"):
            raise _AttemptError(f"The response holds no answer: {self._message(raw)}")
        return value

    def _message(self, raw: bytes) -> str:
        """The message in an error's body: at most 500 characters, without the key."""
        text = _error_text(raw)
        return (text.replace(self._key, "***") if self._key else text)[:500]


def _run_in_thread(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine in a thread with an event loop of its own; a notebook's already runs one.

    An exception in the calling thread, such as Ctrl-C, cancels the coroutine.
    """
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Result]]] = Future()

    async def main() -> Result:
        task = asyncio.ensure_future(work)
        started.set_result((asyncio.get_running_loop(), task))
        return await task

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(asyncio.run, main())
        try:
            # A signal that arrives just before a thread starts to wait does not wake it. So the
            # wait is a short one, and Python calls the signal's handler between two of them.
            while not wait([result], timeout=0.2).done:
                pass
        except BaseException:
            loop, task = started.result()
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(task.cancel)
            raise
        return result.result()


def _checked_url(url: str) -> str:
    """The base URL without a slash at its end. Errors do not repeat it, as it may hold a key."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        parsed = httpx.URL()
    extra = parsed.userinfo or parsed.query or parsed.fragment or re.search(r"\s", str(url))
    route = parsed.path.rstrip("/").endswith("completions")
    if parsed.scheme not in ("http", "https") or not parsed.host or extra or route:
        raise OpenQwenError(
            "This is not the base URL of a server.",
            where="Endpoint, url",
            do="give one such as http://127.0.0.1:8000/v1, without a route, a query, white space "
            "or a key (give it as api_key)",
        )
    return str(parsed).rstrip("/")


def _checked_key(key: str | None) -> str | None:
    """The key without white space around it. Errors do not repeat it."""
    key = (key or "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        what = "The key holds spaces, line ends or characters beyond ASCII."
        raise OpenQwenError(what, where="Endpoint, api_key")
    return key or None


def _folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"The cache folder cannot be made: {error.strerror}."
        raise OpenQwenError(what, where=path, do="give another cache") from None
    return path


def _write(path: Path, response: Json) -> None:
    """Write a response, so that other processes see all of it or none."""
    with disk_errors(path):
        handle, aside = tempfile.mkstemp(prefix=".", suffix=".aside", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(response, file, ensure_ascii=False)
            os.replace(aside, path)
        finally:
            Path(aside).unlink(missing_ok=True)


def _failure(response: httpx.Response, message: str) -> _AttemptError:
    """The error for a status other than success."""
    status = response.status_code
    retry = status in (408, 429) or status >= 500
    if (requested := response.headers.get("x-should-retry")) in ("true", "false"):
        retry = requested == "true"
    what = f"The server answered {status}: {message or response.reason_phrase}"
    wait = retry_after(response.headers)
    if retry and wait and wait > _LONGEST_RETRY_AFTER:
        what = f"{what} (it asks to wait {wait:.0f} seconds)"
        return _AttemptError(what, retry=False, do="start again later")
    return _AttemptError(what, retry, wait, _WHAT_TO_DO.get(status))


def _error_text(raw: bytes) -> str:
    """The message in an error's body (of OpenAI, FastAPI or llama.cpp), on one line."""
    value: Any = raw.decode(errors="replace")
    with suppress(ValueError):
        value = parse_json(raw)
    for name in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(name):
            value = value[name]
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        faults = []
        for item in value:
            place = ".".join(map(str, item.get("loc") or ()))
            faults.append(f"{place}: {item.get('msg')}")
        value = "; ".join(faults)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
