"""Clients that people use, against the server: they must not notice that it is not OpenAI's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import BaseModel
from serving import listening

from detox_guard import GuardPolicy
from detox_guard.server import ServerConfig, create_app
from detox_guard.testing import ScriptedDetoxiGen, ScriptedScorer, tool_call

SCHEMA = {"type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}
TOOL: Any = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": SCHEMA}}
HI: Any = [{"role": "user", "content": "Hi"}]


NOISY = pytest.mark.filterwarnings("ignore")
"""For clients that warn of themselves."""


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client that is not in every environment (`make test-clients`). LiteLLM would ask the net for prices."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    return pytest.importorskip(name)


class Place(BaseModel):
    """Where to look."""

    at: str


def say(prompt: Any, params: Any) -> str:
    """What the request calls for."""
    if params.grammar is not None and params.grammar.kind == "tool_calls":
        return tool_call(json.loads(params.grammar.body)[0][0], at="fox")
    if params.grammar is not None:
        return '{"at": "fox"}'
    if getattr(prompt, "tools", ()):
        return tool_call("look", at="fox")
    return "All is fine. You idiot. And so on." if params.seed == 13 else "Hello, dear reader."


@pytest.fixture(scope="module")
def url() -> Any:
    config = ServerConfig(guard=GuardPolicy(scorer=ScriptedScorer("idiot")))
    with listening(create_app(ScriptedDetoxiGen(say), config)) as address:
        yield address + "/v1"


# -- the official SDK


def test_openai_chats_streams_and_reads_the_detox_record(url: str) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(
            model="scripted/words", messages=HI, seed=13, extra_body={"detox": {"alpha": 2}}
        )
        stream = client.chat.completions.create(model="scripted/words", messages=HI, seed=13, stream=True)
        chunks = [chunk.choices[0] for chunk in stream]
        legacy = client.completions.create(model="scripted/words", prompt="Hi", max_tokens=3)
        moderated = client.moderations.create(input="You idiot.")
        names = [one.id for one in client.models.list()]
    assert whole.choices[0].message.content == "All is fine. [removed]"
    assert whole.choices[0].finish_reason == "content_filter"
    assert whole.choices[0].detox["alpha"] == 2
    assert "".join(one.delta.content or "" for one in chunks) == "All is fine. [removed]"
    assert chunks[-1].finish_reason == "content_filter"
    assert legacy.choices[0].text == "Hello, dear reader."
    assert moderated.results[0].flagged
    assert names == ["scripted/words"]


async def test_openai_async_streams_with_usage(url: str) -> None:
    openai = pytest.importorskip("openai")
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model="scripted/words", messages=HI, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == "Hello, dear reader."
    assert [one.usage.prompt_tokens for one in chunks if one.usage] == [1]


def test_openai_tools_and_structured_outputs(url: str) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        called = client.chat.completions.create(model="scripted/words", messages=HI, tools=[TOOL])
        call = called.choices[0].message.tool_calls[0]
        answered = client.chat.completions.create(
            model="scripted/words",
            messages=[*HI, called.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "a fox"}],
        )
        parsed = client.chat.completions.parse(model="scripted/words", messages=HI, response_format=Place)
    assert (call.function.name, call.function.arguments) == ("look", '{"at": "fox"}')
    assert answered.choices[0].message.content == "Hello, dear reader."
    assert parsed.choices[0].message.parsed == Place(at="fox")


def test_openai_raises_its_own_errors(url: str) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="gpt-x", messages=HI)
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="scripted/words", messages=HI, frequency_penalty=1)
    assert refused.value.param == "frequency_penalty"


# -- LangChain, LiteLLM, LlamaIndex


async def test_langchain_chats_streams_calls_tools_and_gives_structures(url: str) -> None:
    openai = pytest.importorskip("langchain_openai")
    with httpx.Client() as client:
        async with httpx.AsyncClient() as aclient:
            clients = {"http_client": client, "http_async_client": aclient}
            llm = openai.ChatOpenAI(
                base_url=url, api_key="none", model="scripted/words", max_retries=0, stream_usage=True, **clients
            )
            await langchain_uses(llm)


async def langchain_uses(llm: Any) -> None:
    assert llm.invoke("Hi").content == "Hello, dear reader."
    chunks = [chunk async for chunk in llm.astream("Hi", seed=13)]
    assert "".join(chunk.text for chunk in chunks) == "All is fine. [removed]"
    assert [chunk.usage_metadata["input_tokens"] for chunk in chunks if chunk.usage_metadata] == [1]
    reply = llm.bind_tools([TOOL], tool_choice="look").invoke("Hi")
    assert [(call["name"], call["args"]) for call in reply.tool_calls] == [("look", {"at": "fox"})]
    assert llm.with_structured_output(Place).invoke("Hi") == Place(at="fox")
    assert await llm.with_structured_output(Place, method="function_calling").ainvoke("Hi") == Place(at="fox")


@NOISY
async def test_litellm_chats_streams_and_calls_tools(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    litellm = imported("litellm", monkeypatch)
    asked = {"model": "openai/scripted/words", "messages": HI, "api_base": url, "api_key": "none"}
    assert litellm.completion(**asked).choices[0].message.content == "Hello, dear reader."
    ended = litellm.completion(**asked, seed=13, extra_body={"detox": {"alpha": 2}}).choices[0]
    assert (ended.message.content, ended.finish_reason) == ("All is fine. [removed]", "content_filter")
    said = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**asked, stream=True)]
    assert "".join(said) == "Hello, dear reader."
    stream = await litellm.acompletion(**asked, seed=13, stream=True)
    chunks = [chunk.choices[0] async for chunk in stream]
    assert "".join(one.delta.content or "" for one in chunks) == "All is fine. [removed]"
    assert chunks[-1].finish_reason == "content_filter"
    (call,) = litellm.completion(**asked, tools=[TOOL], tool_choice="required").choices[0].message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("look", {"at": "fox"})
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**asked, frequency_penalty=1)


@NOISY
async def test_llama_index_chats_streams_completes_and_calls_tools(url: str) -> None:
    like = pytest.importorskip("llama_index.llms.openai_like")
    from llama_index.core.llms import ChatMessage
    from llama_index.core.tools import FunctionTool

    asked = {"model": "scripted/words", "api_base": url, "api_key": "none", "max_retries": 0}
    llm = like.OpenAILike(**asked, is_chat_model=True, is_function_calling_model=True)
    assert llm.chat([ChatMessage("Hi")]).message.content == "Hello, dear reader."
    assert "".join(str(one.delta) for one in llm.stream_chat([ChatMessage("Hi")])) == "Hello, dear reader."
    said = [str(one.delta) async for one in await llm.astream_chat([ChatMessage("Hi")], seed=13)]
    assert "".join(said) == "All is fine. [removed]"
    text = like.OpenAILike(**asked, is_chat_model=False)
    assert text.complete("Hi").text == "Hello, dear reader."
    look = FunctionTool.from_defaults(lambda at: at, name="look", description="Look.")
    calls = llm.get_tool_calls_from_response(llm.chat_with_tools([look], "Hi", tool_required=True))
    assert [(call.tool_name, call.tool_kwargs) for call in calls] == [("look", {"at": "fox"})]


# -- what the docs and examples say


NEEDS = {
    "docs": "openai",
    "with_openai": "openai",
    "with_langchain": "langchain_openai",
    "with_litellm": "litellm",
    "with_llama_index": "llama_index.llms.openai_like",
}


@pytest.mark.parametrize("name", NEEDS)
@NOISY
def test_examples_of_clients_run(
    name: str, url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    imported(NEEDS[name], monkeypatch)
    root = Path(__file__).parents[2]
    if name == "docs":
        page = (root / "docs/server.md").read_text("utf-8")
        (code,) = re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    else:
        code = (root / f"examples/serving/{name}.py").read_text("utf-8")
    code = code.replace("http://127.0.0.1:8000/v1", url).replace("name: str\n    legs: int", "at: str")
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "scripted/words")
    exec(compile(code, name, "exec"), {"__name__": name})
    assert "Hello, dear reader." in capsys.readouterr().out


def test_every_client_has_an_example() -> None:
    root = Path(__file__).parents[2] / "examples/serving"
    assert {path.stem for path in root.glob("*.py")} == NEEDS.keys() - {"docs"}
