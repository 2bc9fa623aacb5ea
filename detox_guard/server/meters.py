"""Figures for Prometheus. Knows prometheus-client and what is counted; knows no HTTP form."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from detox_guard.results import Generation
    from detox_guard.scorers.base import ToxicityScorer
    from detox_guard.server.models import Models

__all__ = ["Meters", "Timed"]

_SHORT = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_NATS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class Meters:
    """All counters of one server, in a registry of its own."""

    def __init__(self, models: Models) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("detox_guard_requests", "Requests answered.", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "detox_guard_request_seconds", "Whole requests.", ["route"], buckets=_SHORT, registry=registry
        )
        self.under_way = Gauge("detox_guard_requests_under_way", "Requests under way.", registry=registry)
        self._first = Histogram(
            "detox_guard_first_text_seconds",
            "Until a reply's first text.",
            ["model"],
            buckets=_SHORT,
            registry=registry,
        )
        self._between = Histogram(
            "detox_guard_between_text_seconds", "Between pieces of text.", ["model"], buckets=_SHORT, registry=registry
        )
        self._tokens = Counter(
            "detox_guard_tokens", "Tokens: prompt, reply, steered, guarded, taken_back.", ["model", "kind"],
            registry=registry,
        )  # fmt: skip
        self._ended = Counter(
            "detox_guard_replies", "Replies by how they ended.", ["model", "reason"], registry=registry
        )
        self._interventions = Counter(
            "detox_guard_interventions", "What guards did.", ["model", "action"], registry=registry
        )
        self._kl = Histogram(
            "detox_guard_steering_nats", "KL(steered from plain) a token, mean of a reply.", ["model"], buckets=_NATS,
            registry=registry,
        )  # fmt: skip
        self.scorer = Histogram(
            "detox_guard_scorer_seconds", "One call of a scorer.", ["scorer"], buckets=_SHORT, registry=registry
        )
        registry.register(_Engines(models))

    def came(self, model: str, seconds: float, *, first: bool) -> None:
        """Text came, so long after the request or the text before."""
        (self._first if first else self._between).labels(model).observe(seconds)

    def done(self, model: str, reply: Generation) -> None:
        """A reply is whole."""
        written = reply.usage.completion_tokens
        counts = {
            "prompt": reply.usage.prompt_tokens,
            "reply": written,
            "steered": written if reply.steering.alpha > 0 and reply.steering.detoxifiers else 0,
            "guarded": written if reply.guard is not None else 0,
            "taken_back": reply.usage.discarded_tokens,
        }
        for kind, count in counts.items():
            self._tokens.labels(model, kind).inc(count)
        self._ended.labels(model, reply.finish_reason).inc()
        for one in reply.interventions:
            self._interventions.labels(model, one.action).inc()
        self._kl.labels(model).observe(reply.steering.mean_kl_steering)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self.registry)


class Timed:
    """A scorer whose calls are timed."""

    def __init__(self, scorer: ToxicityScorer, meters: Meters) -> None:
        self._scorer, self._meters = scorer, meters

    @property
    def name(self) -> str:
        """The scorer's own."""
        return self._scorer.name

    def score(self, texts: Sequence[str]) -> list[float]:
        """The scorer's own numbers."""
        began = time.perf_counter()
        try:
            return self._scorer.score(texts)
        finally:
            self._meters.scorer.labels(self.name).observe(time.perf_counter() - began)

    def __getattr__(self, name: str) -> Any:
        """What else the scorer has, such as `prepare`."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._scorer, name)


class _Engines:
    """What the engines hold now, asked when somebody looks."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """One gauge a figure, and what was decoded, whoever took it."""
        gauges = {
            name: GaugeMetricFamily(f"detox_guard_engine_{name}", f"The engine's {name} in use.", labels=["model"])
            for name in ("seats", "rows", "queued")
        }
        decoded = CounterMetricFamily(
            "detox_guard_engine_decoded_tokens", "Tokens decoded, also for who hung up.", labels=["model", "kind"]
        )
        for served in self._models:
            stats = getattr(served.model, "stats", None)
            if stats is None or served.model.closed:
                continue
            now = stats()
            for name, gauge in gauges.items():
                gauge.add_metric([served.name], getattr(now, name))
            decoded.add_metric([served.name, "steered"], now.tokens_steered)
            decoded.add_metric([served.name, "plain"], now.tokens_plain)
        yield from gauges.values()
        yield decoded
