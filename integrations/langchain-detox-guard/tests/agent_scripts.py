"""Agents under the middleware, on scripted words."""

from __future__ import annotations

from typing import Any

from detox_guard.testing import ScriptedDetoxiGen, tool_call
from langchain.agents import create_agent
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from pydantic import BaseModel, Field

from langchain_detox_guard import ChatDetoxiGen, DetoxMiddleware
from langchain_scripts import ROTTEN


@tool
def read_note(name: str) -> str:
    """Read a note."""
    return f"The note {name} is short. Its author is rotten. It ends here."


class Foreign(GenericFakeChatModel):
    """A chat model that is none of ours, and keeps the names of what it was told."""

    told: set[str] = Field(default_factory=set)

    def bind_tools(self, tools: Any, **_: Any) -> Any:
        return self

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        self.told.update(kwargs)
        return super()._generate(*args, **kwargs)


def until(alpha: float) -> Any:
    """A model that is rude below this alpha."""

    def script(prompt: Any, params: Any) -> str:
        if prompt.messages[-1]["content"].startswith("Say the same again"):
            return "That was a poor idea."
        return "That was a fine idea." if params.alpha >= alpha else "Good morning. That was a rotten idea."

    return ScriptedDetoxiGen(script)


def run(detoxigen: ScriptedDetoxiGen, *tools: Any, **options: Any) -> dict[str, Any]:
    middleware = DetoxMiddleware(scorer=ROTTEN, **options)
    agent = create_agent(ChatDetoxiGen(detoxigen=detoxigen, seed=1), list(tools), middleware=[middleware])
    return dict(agent.invoke({"messages": [HumanMessage("What do you think?")]}))


def alphas(detoxigen: ScriptedDetoxiGen) -> list[float]:
    return [params.alpha for _, _, params in detoxigen.calls]


def calling(name: str, arguments: dict[str, Any]) -> ScriptedDetoxiGen:
    """A model that calls the tool once, then answers."""

    def script(prompt: Any, params: Any) -> str:
        done = any(message["role"] == "tool" for message in prompt.messages)
        return "Here you are." if done else tool_call(name, **arguments)

    return ScriptedDetoxiGen(script)


class Verdict(BaseModel):
    """A verdict."""

    words: str
