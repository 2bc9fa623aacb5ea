"""The real engine on the embedded default backbone: what a scripted one cannot show. Few tokens each."""

from __future__ import annotations

import asyncio
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from integrating import cancel_in_its_seat, keeps_turning
from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.detox_guard import DetoxiGenLLM, detox_options, get_detox_response_synthesizer
from llama_index_harness import nodes

from detox_guard import GuardPolicy, PromptTooLongError

if TYPE_CHECKING:
    from collections.abc import Sequence

EXAMPLES = Path(__file__).parents[3] / "examples"
MESSAGES = [ChatMessage("Name three colours.")]
WAYS = ["chat", "stream_chat", "achat", "astream_chat"]


@pytest.fixture(scope="module")
def llm() -> DetoxiGenLLM:
    return DetoxiGenLLM(max_new_tokens=8, seed=3)


async def last(llm: DetoxiGenLLM, way: str, prompt: Any, **kwargs: Any) -> Any:
    result = getattr(llm, way)(prompt, **kwargs)
    result = await result if way.startswith("a") else result
    if way.startswith("stream"):
        return list(result)[-1]
    return [response async for response in result][-1] if way.startswith("astream") else result


async def test_all_ways_say_the_same_and_count_as_the_tokenizer(llm: DetoxiGenLLM) -> None:
    chats = [await last(llm, way, MESSAGES) for way in WAYS]
    assert len({response.message.content for response in chats}) == 1
    engine = llm.load()
    asked = engine.count_tokens([{"role": "user", "content": MESSAGES[0].content}])
    assert {response.raw["usage"]["prompt_tokens"] for response in chats} == {asked}
    assert {response.raw["usage"]["completion_tokens"] for response in chats} == {8}
    plain = [await last(llm, way.replace("chat", "complete"), "The sky is") for way in WAYS]
    assert len({response.text for response in plain}) == 1
    assert plain[0].raw["usage"]["prompt_tokens"] == engine.count_tokens("The sky is")
    assert 0 < plain[0].raw["detox"]["alpha"] <= 3.0
    assert plain[0].raw["detox"]["mean_kl_detoxifier"] > 0


def test_metadata_and_tokenizer(llm: DetoxiGenLLM) -> None:
    metadata, engine = llm.metadata, llm.load()
    assert metadata.context_window == engine.context_window
    assert (metadata.is_chat_model, metadata.is_function_calling_model) == (True, engine.supports_tools)
    assert llm.encode("Name three colours.") == engine.encode("Name three colours.")
    assert DetoxiGenLLM(max_new_tokens=8).load() is engine  # one engine a process


async def test_the_event_loop_keeps_turning(llm: DetoxiGenLLM) -> None:
    assert len(await keeps_turning(*(llm.achat(MESSAGES, max_new_tokens=12) for _ in range(4)))) == 4


async def test_cancelling_frees_the_seat(llm: DetoxiGenLLM) -> None:
    await cancel_in_its_seat(llm.load(), llm.achat(MESSAGES, max_new_tokens=2000))


async def test_concurrent_calls_share_the_batch(llm: DetoxiGenLLM) -> None:
    engine, most = llm.load(), 0
    task = asyncio.gather(*(llm.achat(MESSAGES, max_new_tokens=16, ignore_eos=True) for _ in range(8)))
    while not task.done():
        most = max(most, engine.stats().seats)
        await asyncio.sleep(0)
    assert all(response.raw["usage"]["completion_tokens"] == 16 for response in await task)
    assert most == 8


class Person(BaseModel):
    """A person."""

    name: str
    role: Literal["reader", "writer"]


async def test_structured_answers_always_parse(llm: DetoxiGenLLM) -> None:
    prompt = PromptTemplate("Describe {who}.")
    with detox_options(max_new_tokens=48):
        people = [
            llm.structured_predict(Person, prompt, who="Ann"),
            await llm.as_structured_llm(Person).achat([ChatMessage("Describe Ben.")]),
        ]
    assert isinstance(people[0], Person)
    assert isinstance(people[1].raw, Person)


class Light(BaseModel):
    """How bright."""

    level: Literal["low", "high"]


def test_a_forced_tool_call_is_valid(llm: DetoxiGenLLM) -> None:
    tool = FunctionTool.from_defaults(
        lambda level: level, name="set_light", description="Set the light.", fn_schema=Light
    )
    response = llm.chat_with_tools([tool], "Make it bright.", tool_required=True, max_new_tokens=48)
    (selection,) = llm.get_tool_calls_from_response(response)
    assert (selection.tool_name, set(selection.tool_kwargs)) == ("set_light", {"level"})
    assert selection.tool_kwargs["level"] in ("low", "high")
    assert not response.message.content


class EverythingIsToxic:
    name = "everything"

    def score(self, texts: Sequence[str]) -> list[float]:
        return [0.9] * len(texts)


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
async def test_the_guard_takes_back_what_it_decoded(llm: DetoxiGenLLM, streaming: bool) -> None:
    policy = GuardPolicy(scorer=EverythingIsToxic(), max_rewinds=1)
    synthesizer = get_detox_response_synthesizer(llm, policy=policy, context=None, streaming=streaming)
    response = await synthesizer.asynthesize("When?", nodes("It opens at nine."))
    text = "".join([delta async for delta in response.response_gen]) if streaming else str(response)
    assert text.strip() == "[removed]"
    report = response.metadata["detox"]
    assert [taken["action"] for taken in report["interventions"]] == ["rewind", "replace"]
    assert report["interventions"][0]["next_alpha"] > report["interventions"][0]["alpha"]
    assert report["discarded_tokens"] > 0


async def test_a_prompt_that_is_too_long_is_named(llm: DetoxiGenLLM) -> None:
    window = llm.metadata.context_window
    for way in ("complete", "acomplete"):
        with pytest.raises(PromptTooLongError):
            await last(llm, way, "word " * (window + 10))


@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning")  # of llama-index-workflows
@pytest.mark.parametrize(
    ("name", "tokens", "said"),
    [
        ("query_engine", 6, "from opening hours"),
        ("chat_bot", 6, "Bot: "),
        ("agent", 32, "tool: price"),
        ("foreign_llm", 6, "1 passage screened, 1 sentence replaced"),
    ],
)
def test_examples(name: str, tokens: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = EXAMPLES / f"llama_index_{name}.py"
    assert len(path.read_text("utf-8").splitlines()) < 80
    with detox_options(max_new_tokens=tokens):
        runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    assert said in out
    assert "idiot" not in out
