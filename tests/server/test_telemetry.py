"""Traces with OpenTelemetry's GenAI conventions."""

from __future__ import annotations

import pytest
from serving import chat, events, served

from detox_guard import GuardPolicy
from detox_guard.server import ServerConfig
from detox_guard.testing import ScriptedDetoxiGen, ScriptedScorer

trace = pytest.importorskip("opentelemetry.sdk.trace")


def test_a_request_is_a_span_without_a_word_of_its_text() -> None:
    from opentelemetry import trace as api
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = trace.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    api.set_tracer_provider(provider)
    model = ScriptedDetoxiGen(["Secret. You idiot.", RuntimeError("secret")])
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    config = ServerConfig(telemetry=True, guard=GuardPolicy(scorer=ScriptedScorer("idiot")))
    with served(model, config) as client:
        events(
            client.post("/v1/completions", json={"prompt": "secret", "stream": True}, headers={"traceparent": parent})
        )
        chat(client, detox={"guard": False}, max_tokens=7)
    ended, failed = [one for one in exporter.get_finished_spans() if one.instrumentation_scope.name.startswith("detox")]
    assert ended.name == "text_completion scripted/words"
    assert f"{ended.context.trace_id:032x}" in parent
    assert ended.attributes["gen_ai.response.finish_reasons"] == ("guard",)
    assert ended.attributes["detox_guard.interventions"] == 1
    assert ended.attributes["gen_ai.usage.input_tokens"] == 1
    assert failed.attributes["error.type"] == "RuntimeError"
    assert failed.attributes["gen_ai.operation.name"] == "chat"
    assert failed.attributes["gen_ai.request.max_tokens"] == 7
    assert "ecret" not in str([dict(one.attributes) for one in (ended, failed)])
