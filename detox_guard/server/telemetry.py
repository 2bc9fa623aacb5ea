"""OpenTelemetry traces with the GenAI conventions. Knows names of attributes; tells no word of a prompt or a reply.

`opentelemetry` is asked for only where `ServerConfig.telemetry` is on. Where traces go is the environment's (OTEL_…).
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from detox_guard.errors import DetoxGuardError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from detox_guard.server.answers import Answer
    from detox_guard.server.asking import Asked
    from detox_guard.server.state import State

__all__ = ["export_traces", "traced"]

_NAME = "detox_guard.server"


def export_traces() -> None:
    """Send spans by OTLP, unless the process has a way of its own. Raises `DetoxGuardError` without the extra."""
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise DetoxGuardError(
            f"telemetry needs more packages: {error}", hint="pip install 'detox-guard[otel]'"
        ) from None
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)


@contextmanager
def traced(
    state: State, operation: str, model: str, asked: Asked, answer: Answer, headers: Mapping[str, str]
) -> Iterator[None]:
    """A span around the decoding of one request; a child of the caller's, if it names one (`traceparent`)."""
    if not state.config.telemetry:
        yield
        return
    from opentelemetry import propagate, trace
    from opentelemetry.trace import SpanKind, Status, StatusCode

    params = asked.prompts[0][1]
    told: dict[str, Any] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "detox_guard",
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": params.max_new_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.choice.count": len(asked.prompts),
        "detox_guard.guarded": params.guard is not None,
    }
    tracer = trace.get_tracer(_NAME)
    span = tracer.start_span(
        f"{operation} {model}", context=propagate.extract(headers), kind=SpanKind.SERVER, attributes=told
    )
    try:
        yield
    except BaseException as error:
        span.set_attribute("error.type", type(error).__name__)
        span.set_status(Status(StatusCode.ERROR))
        raise
    finally:
        usage, replies = answer.usage(), answer.replies
        span.set_attributes(
            {
                "gen_ai.response.id": answer.id,
                "gen_ai.response.model": model,
                "gen_ai.response.finish_reasons": [reply.finish_reason for reply in replies],
                "gen_ai.usage.input_tokens": usage["prompt_tokens"],
                "gen_ai.usage.output_tokens": usage["completion_tokens"],
                "detox_guard.taken_back_tokens": sum(reply.usage.discarded_tokens for reply in replies),
                "detox_guard.interventions": sum(len(reply.interventions) for reply in replies),
            }
        )
        span.end()
