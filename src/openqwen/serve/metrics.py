"""Prometheus metrics under vLLM's names, so that its dashboards show this server too."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import prometheus_client as prometheus
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE

from openqwen.engine import Event, Stats

if TYPE_CHECKING:
    from openqwen.serve.bridge import Answers

__all__ = ["CONTENT_TYPE", "Metrics"]
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
_OF_ENGINE: list[
    tuple[str, str, Callable[[Stats], float]]
] = [  # gauges, and counters where the name says total
    ("vllm:num_requests_running", "Answers being made.", lambda s: s.running),
    ("vllm:num_requests_waiting", "Answers waiting for room.", lambda s: s.waiting),
    (
        "vllm:kv_cache_usage_perc",
        "Share of the cache's pages that are held, 0 to 1.",
        lambda s: s.pages_used / _pages(s),
    ),
    ("openqwen:pages_held", "Pages of the cache that requests hold.", lambda s: s.pages_used),
    ("openqwen:weights_version", "Version of the weights at work.", lambda s: s.version),
    ("vllm:num_preemptions_total", "Answers put back to make room.", lambda s: s.preemptions),
    (
        "vllm:prefix_cache_queries_total",
        "Prompt tokens looked up in the cache.",
        lambda s: s.tokens_in,
    ),
    ("vllm:prefix_cache_hits_total", "Prompt tokens found in the cache.", lambda s: s.cache_hits),
    ("openqwen:drafted_tokens_total", "Tokens drafted ahead.", lambda s: s.drafted),
    ("openqwen:accepted_tokens_total", "Drafted tokens that were right.", lambda s: s.accepted),
]


def _pages(stats: Stats) -> int:
    return stats.pages_used + stats.pages_free + stats.pages_cached


class Metrics:
    """What the server has done, to be read at /metrics."""

    def __init__(self, model: str):
        prometheus.disable_created_metrics()
        self._registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self._registry)
        self._seen: list[float] = [0.0] * len(_OF_ENGINE)

        def make(
            kind: Any, name: str, text: str, labels: tuple[str, ...] = (), **options: Any
        ) -> Any:
            metric = kind(name, text, ["model_name", *labels], registry=self._registry, **options)
            return metric if labels else metric.labels(model)

        def seconds(name: str, text: str) -> Any:
            return make(prometheus.Histogram, f"vllm:{name}_seconds", text, buckets=_SECONDS)

        def tokens(name: str, text: str) -> Any:
            return make(prometheus.Histogram, f"vllm:request_{name}_tokens", text, buckets=_TOKENS)

        kinds = [
            prometheus.Counter if name.endswith("_total") else prometheus.Gauge
            for name, _, _ in _OF_ENGINE
        ]
        self._of_engine = [
            make(kind, name, text) for kind, (name, text, _) in zip(kinds, _OF_ENGINE)
        ]
        self._prompt = make(prometheus.Counter, "vllm:prompt_tokens", "Prompt tokens read.")
        self._generated = make(prometheus.Counter, "vllm:generation_tokens", "Tokens made.")
        ended = make(
            prometheus.Counter, "vllm:request_success", "Answers ended.", ("finished_reason",)
        )
        self.finished = lambda reason, count=1: ended.labels(model, reason).inc(count)
        self._first = seconds("time_to_first_token", "Until the first token.")
        self._between = seconds("inter_token_latency", "Between two tokens.")
        self._whole = seconds("e2e_request_latency", "Until the end.")
        self._waited = seconds("request_queue_time", "Waiting for room.")
        self._prompts, self._answers = (
            tokens("prompt", "Of a prompt."),
            tokens("generation", "Of an answer."),
        )

    def text(self) -> bytes:
        """The page."""
        return prometheus.generate_latest(self._registry)

    def update(self, stats: Stats) -> None:
        """The engine's own numbers after a step; a gauge goes up and down, a counter up alone."""
        for number, (metric, (_, _, read)) in enumerate(zip(self._of_engine, _OF_ENGINE)):
            value = read(stats)
            metric.inc(value - self._seen[number])
            self._seen[number] = value

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
            self._answers.observe(len(request.token_ids))
            self.finished(event.finish_reason)
