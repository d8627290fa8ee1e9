"""Prometheus metrics under vLLM's names, so that its dashboards can show this server."""

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
# Of the engine: counters where the name ends in _total, else gauges.
_OF_ENGINE: list[tuple[str, str, Callable[[Stats], float]]] = [
    ("vllm:num_requests_running", "Answers in progress.", lambda s: s.running),
    ("vllm:num_requests_waiting", "Answers waiting for a place.", lambda s: s.waiting),
    (
        "vllm:kv_cache_usage_perc",
        "Share of the cache's pages in use, 0 to 1.",
        lambda s: s.pages_used / _pages(s),
    ),
    ("openqwen:pages_held", "Pages of the cache in use by requests.", lambda s: s.pages_used),
    ("openqwen:weights_version", "Version of the weights in use.", lambda s: s.version),
    ("vllm:num_preemptions_total", "Answers suspended to free pages.", lambda s: s.preemptions),
    (
        "vllm:prefix_cache_queries_total",
        "Prompt tokens looked up.",
        lambda s: s.tokens_in,
    ),
    ("vllm:prefix_cache_hits_total", "Prompt tokens found in the cache.", lambda s: s.cache_hits),
    ("openqwen:drafted_tokens_total", "Draft tokens.", lambda s: s.drafted),
    ("openqwen:accepted_tokens_total", "Draft tokens that were accepted.", lambda s: s.accepted),
]


def _pages(stats: Stats) -> int:
    return stats.pages_used + stats.pages_free + stats.pages_cached


class Metrics:
    """The counters, gauges and histograms of /metrics."""

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
        self._prompt = make(prometheus.Counter, "vllm:prompt_tokens", "Prompt tokens.")
        self._generated = make(prometheus.Counter, "vllm:generation_tokens", "Generated tokens.")
        ended = make(
            prometheus.Counter, "vllm:request_success", "Finished answers.", ("finished_reason",)
        )
        self.finished = lambda reason, count=1: ended.labels(model, reason).inc(count)
        self._first = seconds("time_to_first_token", "Seconds to the first token.")
        self._between = seconds("inter_token_latency", "Seconds between two tokens.")
        self._whole = seconds("e2e_request_latency", "Seconds to the end of the answer.")
        self._waited = seconds("request_queue_time", "Seconds of waiting for a place.")
        self._prompts = tokens("prompt", "Tokens of a prompt.")
        self._answers = tokens("generation", "Tokens of an answer.")

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return prometheus.generate_latest(self._registry)

    def update(self, stats: Stats) -> None:
        """Take over the engine's statistics after a step."""
        for number, (metric, (_, _, read)) in enumerate(zip(self._of_engine, _OF_ENGINE)):
            value = read(stats)
            metric.inc(value - self._seen[number])
            self._seen[number] = value

    def observe(self, answers: "Answers", number: int, event: Event, now: float) -> None:
        """Count an event that is about to be sent. now: the time, as of time.monotonic()."""
        request, count = event.request, len(event.token_ids)
        self._generated.inc(count)
        if not answers.last[number]:
            self._prompt.inc(len(request.prompt_ids))
            self._prompts.observe(len(request.prompt_ids))
            self._first.observe(now - answers.arrived)
            if request.started is not None:
                self._waited.observe(max(request.started - request.arrived, 0.0))
        else:
            for _ in range(count):  # the tokens of one step share its time
                self._between.observe((now - answers.last[number]) / count)
        if event.finish_reason:
            self._whole.observe(now - answers.arrived)
            self._answers.observe(len(request.token_ids))
            self.finished(event.finish_reason)
