"""Prometheus metrics under vLLM's names, so that its dashboards show this server too."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from openqwen.engine import Event, Stats

if TYPE_CHECKING:
    from openqwen.serve.bridge import Answers

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_GAUGES: dict[str, tuple[str, Callable[[Stats], float]]] = {
    "vllm:num_requests_running": ("Answers being made.", lambda s: s.running),
    "vllm:num_requests_waiting": ("Answers waiting for room.", lambda s: s.waiting),
    "vllm:kv_cache_usage_perc": (
        "Share of the cache's pages that are held, 0 to 1.",
        lambda s: s.pages_used / (s.pages_used + s.pages_free + s.pages_cached),
    ),
    "openqwen:pages_held": ("Pages of the cache that requests hold.", lambda s: s.pages_used),
    "openqwen:weights_version": ("Version of the weights at work.", lambda s: s.version),
}
_COUNTERS: dict[str, tuple[str, Callable[[Stats], float]]] = {
    "vllm:num_preemptions": ("Answers put back to make room.", lambda s: s.preemptions),
    "vllm:prefix_cache_queries": ("Prompt tokens looked up in the cache.", lambda s: s.tokens_in),
    "vllm:prefix_cache_hits": ("Prompt tokens found in the cache.", lambda s: s.cache_hits),
    "openqwen:drafted_tokens": ("Tokens drafted ahead.", lambda s: s.drafted),
    "openqwen:accepted_tokens": ("Drafted tokens that were right.", lambda s: s.accepted),
}
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """What the server has done, to be read at /metrics."""

    def __init__(self, model: str):
        disable_created_metrics()
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._labels = {"model_name": model}

        def make(kind: Any, name: str, text: str, **options: Any) -> Any:
            more = options.pop("more", [])
            metric = kind(name, text, ["model_name", *more], registry=self.registry, **options)
            return metric if more else metric.labels(**self._labels)

        self._gauges = [(make(Gauge, name, text), read) for name, (text, read) in _GAUGES.items()]
        self._counters = [(make(Counter, name, text), read) for name, (text, read) in _COUNTERS.items()]
        self._stats: Stats | None = None
        self._prompt = make(Counter, "vllm:prompt_tokens", "Prompt tokens read.")
        self._generated = make(Counter, "vllm:generation_tokens", "Tokens made.")
        self._success = make(Counter, "vllm:request_success", "Answers ended.", more=["finished_reason"])
        seconds = {"buckets": _SECONDS}
        self._first = make(Histogram, "vllm:time_to_first_token_seconds", "Until the first token.", **seconds)
        self._between = make(Histogram, "vllm:inter_token_latency_seconds", "Between two tokens.", **seconds)
        self._whole = make(Histogram, "vllm:e2e_request_latency_seconds", "Until the end.", **seconds)
        self._waited = make(Histogram, "vllm:request_queue_time_seconds", "Waiting for room.", **seconds)
        self._prompts = make(Histogram, "vllm:request_prompt_tokens", "Tokens of a prompt.", buckets=_TOKENS)
        self._answers = make(Histogram, "vllm:request_generation_tokens", "Tokens of an answer.", buckets=_TOKENS)

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self.registry)

    def update(self, stats: Stats) -> None:
        """The engine's own numbers after a step."""
        for gauge, read in self._gauges:
            gauge.set(read(stats))
        for counter, read in self._counters:
            counter.inc(read(stats) - (read(self._stats) if self._stats else 0))
        self._stats = stats

    def observe(self, answers: "Answers", number: int, event: Event, now: float) -> None:
        """One event, on its way out."""
        request, count = event.request, len(event.token_ids)
        self._generated.inc(count)
        if not answers.last[number]:
            self._prompt.inc(len(request.prompt_ids))
            self._prompts.observe(len(request.prompt_ids))
            self._first.observe(now - answers.arrived)
            if request.started is not None:
                self._waited.observe(max(request.started - request.arrived, 0.0))
        else:
            for _ in range(count):  # several at once came from one step: they share its time
                self._between.observe((now - answers.last[number]) / count)
        if event.finish_reason:
            self._whole.observe(now - answers.arrived)
            self._answers.observe(len(request.output_ids))
            self.finished(event.finish_reason)

    def finished(self, reason: str, count: int = 1) -> None:
        """Answers that ended."""
        if count:
            self._success.labels(**self._labels, finished_reason=reason).inc(count)
