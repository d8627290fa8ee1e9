"""Load a running server with clients that cancel, send malformed requests and reconnect.

    openqwen serve MODEL & python benchmarks/bench_serve.py --seconds 600

A few prompts of random lengths are first answered one at a time, greedily. Under load every
complete answer must be the same. Where two tokens are equally likely up to rounding, either is
right. Metrics have the names of vLLM's benchmark.
"""

import asyncio
import json
import random
import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import httpx
import tyro

from openqwen.support.command import command
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import write_json
from openqwen.support.progress import console, progress

_TIE = 1e-3  # of log-probability
_MALFORMED: list[tuple[str, Any]] = [
    ("/v1/completions", {"prompt": "x", "max_tokens": -1}),
    ("/v1/completions", {"prompt": {"x": 1}}),
    ("/v1/completions", [1, 2]),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "sound"}},
    ),
    ("/v1/embeddings", {"input": []}),
]


@dataclass
class _Tally:
    counts: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(
        default_factory=lambda: {n: [] for n in ("ttft", "tpot", "itl", "e2el")}
    )
    faults: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        self.counts["failed"] += 1
        self.faults.append(text)


@dataclass
class _Answer:
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def differs(self, other: "_Answer") -> bool:
        """Whether the answers differ by more than a tie of two tokens."""
        for mine, theirs, p, q in zip(self.ids, other.ids, self.logprobs, other.logprobs):
            if mine != theirs:
                return abs(p - q) > _TIE
        return len(self.ids) != len(other.ids)


def bench(
    url: str = "http://127.0.0.1:8000",
    seconds: float = 600.0,
    connections: int = 32,
    prompts: int = 16,
    prompt_words: int = 200,
    tokens: int = 128,
    cancelled: float = 0.2,
    malformed: float = 0.05,
    key: str | None = None,
    seed: int = 0,
    output: Path | None = None,
) -> None:
    """Load a server, print the figures, and fail where an answer was wrong or pages leaked.

    A server that is killed and comes back is waited for.

    Args:
        url: The server's address.
        seconds: Length of the load.
        connections: Clients at once.
        prompts: Different prompts.
        prompt_words: Words of the longest prompt; lengths are random up to it.
        tokens: Tokens of the longest answer; lengths are random up to it.
        cancelled: Share of requests that the client cancels.
        malformed: Share of requests that are malformed.
        key: API key.
        seed: Seed of all random draws.
        output: A JSON file for the figures.
    """
    load = _Load(url, connections, tokens, (cancelled, malformed), key, seed)
    result = asyncio.run(load.run(seconds, prompts, prompt_words))
    for name, value in result.items():
        console.print(
            f"{name:<24}{value:,.2f}" if isinstance(value, float) else f"{name:<24}{value}"
        )
    if output:
        write_json(output, result)
    if result["failed"] or result["pages_held_at_end"]:
        raise OpenQwenError("The server failed under load.", url, "see the figures above")


class _Load:
    def __init__(
        self,
        url: str,
        connections: int,
        tokens: int,
        shares: tuple[float, float],
        key: str | None,
        seed: int,
    ):
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=connections + 1)
        self.http = httpx.AsyncClient(base_url=url, headers=headers, timeout=300, limits=limits)
        self.lost: type[Exception] = httpx.TransportError
        self.connections, self.tokens, self.shares, self.seed = connections, tokens, shares, seed
        self.tally = _Tally()

    async def run(self, seconds: float, prompts: int, words: int) -> dict[str, Any]:
        draw = random.Random(self.seed)
        self.asked: list[dict[str, Any]] = [
            {
                "prompt": " ".join(
                    str(draw.randrange(10_000)) for _ in range(draw.randint(1, words))
                ),
                "max_tokens": draw.randint(1, self.tokens),
                "temperature": 0,
                "logprobs": 0,
                "stream": True,
                "return_token_ids": True,
            }
            for _ in range(prompts)
        ]
        try:
            self.alone = [await self._answer(body, None) for body in self.asked]
        except self.lost as error:
            do = f"start it first: {command('serve', 'MODEL')}"
            raise OpenQwenError(
                f"No server answers there ({error}).", where=str(self.http.base_url), do=do
            ) from None
        self.tally, before = _Tally(), await self._metrics()
        with progress("load", seconds, "s") as work:
            start = time.monotonic()
            clients = [
                asyncio.create_task(self._client(n, start + seconds))
                for n in range(self.connections)
            ]
            while any(not client.done() for client in clients):
                await asyncio.wait(clients, timeout=1)
                work.advance(
                    min(time.monotonic() - start, seconds) - work.done,
                    done=self.tally.counts["completed"],
                )
        await asyncio.gather(*clients)
        return self._figures(time.monotonic() - start) | await self._leaks(before)

    async def _client(self, number: int, end: float) -> None:
        draw = random.Random(f"{self.seed} {number}")
        while time.monotonic() < end:
            lot, which = draw.random(), draw.randrange(len(self.asked))
            leave = (
                draw.randint(0, self.asked[which]["max_tokens"]) if lot < self.shares[0] else None
            )
            try:
                if self.shares[0] <= lot < sum(self.shares):
                    path, body = draw.choice(_MALFORMED)
                    status = (await self.http.post(path, json=body)).status_code
                    self.tally.counts["malformed"] += 1
                    if status != 400:
                        self.tally.fault(f"{status} for {body}")
                    continue
                answer = await self._answer(self.asked[which], leave)
            except self.lost:
                self.tally.counts["retried"] += 1
                await asyncio.sleep(0.5)
                continue
            if leave is None and answer.ids and answer.differs(self.alone[which]):
                self.tally.fault(f"prompt {which} has another answer under load")

    async def _answer(self, body: dict[str, Any], leave: int | None) -> _Answer:
        """Send a request and read the answer to its end, or cancel it after `leave` tokens."""
        answer, start, reason = _Answer(), time.monotonic(), None
        first = last = 0.0
        async with self.http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                if response.status_code == 429:
                    self.tally.counts["told_to_wait"] += 1
                    await asyncio.sleep(int(response.headers["retry-after"]) * random.random())
                else:
                    self.tally.fault(f"{response.status_code} {response.text[:200]}")
                return answer
            async for line in response.aiter_lines():
                if leave is not None and len(answer.ids) >= leave:
                    self.tally.counts["cancelled"] += 1
                    return answer
                if not line.startswith("data: {"):
                    continue
                choice, now = json.loads(line[6:])["choices"][0], time.monotonic()
                if choice["token_ids"]:
                    self.tally.seconds["itl" if last else "ttft"].append(now - (last or start))
                    first, last = first or now, now
                    answer.ids += choice["token_ids"]
                    answer.logprobs += choice["logprobs"]["token_logprobs"]
                reason = choice["finish_reason"] or reason
        if reason is None:
            raise self.lost("the answer has no end")
        self.tally.counts["completed"] += 1
        self.tally.counts["total_output_tokens"] += len(answer.ids)
        self.tally.seconds["e2el"].append(time.monotonic() - start)
        if len(answer.ids) > 1:
            self.tally.seconds["tpot"].append((last - first) / (len(answer.ids) - 1))
        return answer

    async def _metrics(self) -> dict[str, float]:
        text = (await self.http.get("/metrics")).text
        found = re.findall(r"^([a-z:_]+?)(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    async def _leaks(self, before: dict[str, float]) -> dict[str, Any]:
        after = await self._metrics()
        for _ in range(100):  # the last cancelled requests are still being removed
            if not after["openqwen:pages_held"]:
                break
            await asyncio.sleep(0.1)
            after = await self._metrics()
        memory = [
            values.get("process_resident_memory_bytes", 0.0) / 2**20 for values in (before, after)
        ]
        held = int(after["openqwen:pages_held"])
        return {
            "pages_held_at_end": held,
            "memory_before_mib": memory[0],
            "memory_after_mib": memory[1],
        }

    def _figures(self, seconds: float) -> dict[str, Any]:
        tally, counts = self.tally, self.tally.counts
        names = (
            "completed",
            "cancelled",
            "malformed",
            "told_to_wait",
            "retried",
            "failed",
            "total_output_tokens",
        )
        out: dict[str, Any] = {"duration": seconds, **{name: counts[name] for name in names}}
        out["request_throughput"] = counts["completed"] / seconds
        out["output_throughput"] = counts["total_output_tokens"] / seconds
        for name, values in tally.seconds.items():
            if len(values) > 1:
                milliseconds = [value * 1e3 for value in values]
                out[f"mean_{name}_ms"], out[f"median_{name}_ms"] = (
                    fmean(milliseconds),
                    median(milliseconds),
                )
                out[f"p99_{name}_ms"] = quantiles(milliseconds, n=100)[-1]
        return out | ({"faults": tally.faults[:5]} if tally.faults else {})


if __name__ == "__main__":
    tyro.cli(bench)
