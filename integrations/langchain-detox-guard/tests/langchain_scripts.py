"""What the scripted model says in these tests.

It depends on the prompt, alpha and seed alone, so that caches, overrides and streams can be told apart.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from detox_guard import ChatPrompt, GuardPolicy, StepError
from detox_guard.testing import Said, ScriptedDetoxiGen, ScriptedScorer, tool_call
from langchain_core.tools import tool
from pydantic import BaseModel

from langchain_detox_guard import ChatDetoxiGen, DetoxiGenLLM

if TYPE_CHECKING:
    from detox_guard import DecodingParams
    from langchain_core.messages import AIMessageChunk

WINDOW = 2048
LONG = "word " * (WINDOW + 1)
ROTTEN = ScriptedScorer("rotten")


def obliging(prompt: Any, params: DecodingParams) -> str | Said:
    """Fills a grammar, calls the first tool, or greets. A prompt that says "break" fails after its second word."""
    messages = prompt.messages if isinstance(prompt, ChatPrompt) else []
    said = messages[-1]["content"] if messages else prompt
    grammar = params.grammar
    if grammar is not None:
        body = json.loads(grammar.body)
        if grammar.kind == "tool_calls":
            name, parameters = body[0]
            return tool_call(name, **example(parameters, said))
        if body == {"type": "object"}:
            return json.dumps({"setup": "some setup", "punchline": "some punchline"})
        return json.dumps(example(body, said), ensure_ascii=False)
    if isinstance(prompt, ChatPrompt) and prompt.tools and messages[-1]["role"] == "user":
        function = prompt.tools[0]["function"]
        return "Let me see.\n" + tool_call(function["name"], **example(function["parameters"], said))
    if "break" in str(prompt):
        return Said("Hello, dear ", error=StepError("the forward pass failed", hint="none"))
    return f"Hello, dear reader! {said[:20]!r} at alpha {params.alpha:g} with seed {params.seed} is fine by me."


def example(schema: dict[str, Any], said: str = "", name: str = "") -> Any:
    """A small value that fits a schema; what the prompt quotes goes into strings, as a model with wits would do."""
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return schema["enum"][0]
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return example(schema[key][0], said, name)
    kind = schema.get("type", "object")
    kind = kind[0] if isinstance(kind, list) else kind
    if kind == "object":
        return {key: example(part, said, key) for key, part in schema.get("properties", {}).items()}
    if kind == "array":
        return [example(schema.get("items", {"type": "string"}), said)] * max(1, schema.get("minItems", 1))
    quoted = re.findall(r"'([^']+)'", said)
    fixed: dict[str, Any] = {"string": quoted[-1] if quoted else f"some {name}".strip(), "integer": 3, "number": 1.5}
    return {**fixed, "boolean": True, "null": None}[kind]


@tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def whole(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    return total


BOTH = pytest.mark.parametrize("kind", [ChatDetoxiGen, DetoxiGenLLM])


POLICY = GuardPolicy(threshold=0.3, ladder=(2.5,))  # type: ignore[arg-type]


class Town(BaseModel):
    """A town."""

    name: str


@tool
def look_up(town: str) -> str:
    """Look it up."""
    return "nothing"


def asked(detoxigen: ScriptedDetoxiGen) -> DecodingParams:
    return detoxigen.calls[-1][2]
