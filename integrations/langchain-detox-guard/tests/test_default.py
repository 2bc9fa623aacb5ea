"""The models over the default backbone: what a scripted model cannot show."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
from detox_guard import DecodingParams, GuardPolicy, PromptTooLongError
from integrating import cancel_in_its_seat, keeps_turning
from langchain_core.caches import InMemoryCache
from langchain_core.documents import Document
from langchain_core.globals import set_llm_cache
from langchain_core.messages import HumanMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.tools import tool

from langchain_detox_guard import ChatDetoxiGen, DetoxiGenLLM, create_detox_rag_chain

if TYPE_CHECKING:
    from detox_guard import DetoxiGen

SEEDS = range(int(os.environ.get("DETOX_GUARD_SCHEMA_SEEDS", "1")))
"""The release check runs five seeds; every day one will do."""


@pytest.fixture
def llm(default_model: DetoxiGen) -> DetoxiGenLLM:
    return DetoxiGenLLM(seed=3, max_tokens=8)


@pytest.fixture
def chat(default_model: DetoxiGen) -> ChatDetoxiGen:
    return ChatDetoxiGen(seed=3, max_tokens=8)


async def test_the_llm_says_the_same_in_all_ways(llm: DetoxiGenLLM, default_model: DetoxiGen) -> None:
    prompt = "My neighbour said that the dog"
    text = default_model.generate(prompt, DecodingParams(seed=3, max_new_tokens=8)).text
    assert llm.invoke(prompt) == text
    assert "".join(llm.stream(prompt)) == text
    assert await llm.ainvoke(prompt) == text
    assert "".join([piece async for piece in llm.astream(prompt)]) == text
    assert llm.batch(["Water boils when", prompt])[1] == text
    assert (await llm.abatch([prompt, "Water boils when"]))[0] == text


def test_an_engine_of_ones_own_and_a_cache(llm: DetoxiGenLLM, chat: ChatDetoxiGen, default_model: DetoxiGen) -> None:
    text, said = llm.invoke("Water boils when"), chat.invoke("Hello.").text
    assert DetoxiGenLLM(detoxigen=default_model, seed=3, max_tokens=8).invoke("Water boils when") == text
    assert ChatDetoxiGen(detoxigen=default_model, seed=3, max_tokens=8).invoke("Hello.").text == said
    set_llm_cache(InMemoryCache())
    asked = default_model.stats().submitted
    for _ in range(2):
        assert llm.invoke("Water boils when") == text
        assert chat.invoke("Hello.").text == said
    assert default_model.stats().submitted == asked + 2


async def test_the_chat_model_says_the_same_in_all_ways(chat: ChatDetoxiGen, default_model: DetoxiGen) -> None:
    prompt = "Tell me about rivers."
    text = default_model.generate([{"role": "user", "content": prompt}], DecodingParams(seed=3, max_new_tokens=8)).text
    assert chat.invoke(prompt).text == text
    assert "".join(chunk.text for chunk in chat.stream(prompt)) == text
    assert (await chat.ainvoke(prompt)).text == text
    assert "".join([chunk.text async for chunk in chat.astream(prompt)]) == text
    assert chat.batch(["Hello.", prompt])[1].text == text
    assert (await chat.abatch([prompt, "Hello."]))[0].text == text


def test_two_models_share_one_engine(llm: DetoxiGenLLM, chat: ChatDetoxiGen, default_model: DetoxiGen) -> None:
    asked = default_model.stats().submitted
    llm.invoke("Hello."), chat.invoke("Hello.")
    assert default_model.stats().submitted == asked + 2


def test_a_stop_string_over_several_tokens(llm: DetoxiGenLLM) -> None:
    text = llm.invoke("Water boils when")
    stop = text[7:17]  # from the middle of a word into another
    assert llm.invoke("Water boils when", stop=[stop]) == text[: text.find(stop)]
    assert "".join(llm.stream("Water boils when", stop=[stop])) == text[: text.find(stop)]


def test_tokens_are_the_models_own(llm: DetoxiGenLLM, chat: ChatDetoxiGen, default_model: DetoxiGen) -> None:
    text = "Fjords are deep, naïve straße."
    assert llm.get_token_ids(text) == chat.get_token_ids(text) == default_model.encode(text)
    message = chat.invoke(text)
    assert message.usage_metadata is not None
    assert chat.get_num_tokens_from_messages([HumanMessage(text)]) == message.usage_metadata["input_tokens"]


def test_steering_is_told_of(chat: ChatDetoxiGen) -> None:
    message = chat.invoke("Hello.", alpha=3.0, calm_share=1.0)
    detox = message.response_metadata["detox"]
    assert detox["alpha"] == 3.0
    assert detox["mean_kl_steering"] > 0
    calm = chat.invoke("The weather in Paris is").response_metadata["detox"]["alpha"]
    assert calm == pytest.approx(chat.alpha * chat.calm_share)
    assert chat.invoke("Hello.", alpha=0.0).response_metadata["detox"]["mean_kl_steering"] == 0
    assert len(json.dumps(detox)) < 2000


def test_a_guard_replaces_and_says_so(chat: ChatDetoxiGen) -> None:
    """Every unit fails at such a threshold: the reply ends with the replacement."""
    policy = GuardPolicy(threshold=0.0001, max_rewinds=0)
    message = chat.invoke("Hello.", guard=policy)
    assert message.text == "[removed]"
    assert message.response_metadata["finish_reason"] == "guard"
    assert message.response_metadata["detox"]["interventions"]


def test_one_prompt_too_long(chat: ChatDetoxiGen) -> None:
    good, bad = chat.batch(["Hello.", "word " * 10_000], return_exceptions=True)
    assert good.text
    assert isinstance(bad, PromptTooLongError)


@pytest.mark.parametrize("way", ["ainvoke", "astream"])
async def test_a_cancelled_task_frees_its_seat(chat: ChatDetoxiGen, default_model: DetoxiGen, way: str) -> None:
    async def run() -> None:
        if way == "astream":
            _ = [chunk async for chunk in chat.astream("Hello.", max_tokens=400)]
        else:
            await chat.ainvoke("Hello.", max_tokens=400)

    await cancel_in_its_seat(default_model, run())


async def test_the_loop_stays_free(chat: ChatDetoxiGen) -> None:
    assert len(await keeps_turning(*(chat.abatch(["Tell me about rivers."] * 2) for _ in range(2)))) == 2


# -- grammars


@tool
def weather(town: str, days: int, unit: str = "C") -> str:
    """The weather in a town."""
    return "fair"


@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_forced_calls_fit_their_schema(chat: ChatDetoxiGen, alpha: float) -> None:
    forced = chat.bind_tools([weather], tool_choice="weather").bind(alpha=alpha, max_tokens=48)
    (call,) = forced.invoke("How is the weather in Oslo?").tool_calls
    assert call["name"] == "weather"
    assert weather.invoke(call["args"]) == "fair"


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


TEXT, WHOLE, YES = {"type": "string", "maxLength": 12}, {"type": "integer"}, {"type": "boolean"}
SCHEMAS = {
    "flat": _object(name=TEXT, age=WHOLE),
    "one": _object(answer=TEXT),
    "bool": _object(fits=YES, why=TEXT),
    "bounds": _object(score={"type": "integer", "minimum": 0, "maximum": 10}),
    "float": _object(price={"type": "number"}, name=TEXT),
    "enum": _object(mood={"enum": ["glad", "calm", "tired"]}),
    "enums": _object(size={"enum": ["S", "M", "L"]}, colour={"enum": ["red", "blue"]}),
    "const": _object(kind={"const": "note"}, text=TEXT),
    "array": _object(words={"type": "array", "items": TEXT, "maxItems": 3}),
    "numbers": _object(values={"type": "array", "items": WHOLE, "minItems": 2, "maxItems": 3}),
    "tuple": _object(pair={"type": "array", "prefixItems": [TEXT, WHOLE], "items": False, "minItems": 2}),
    "nested": _object(person=_object(name=TEXT, home=_object(town=TEXT))),
    "objects": _object(people={"type": "array", "items": _object(name=TEXT), "minItems": 1, "maxItems": 2}),
    "optional": {**_object(name=TEXT, nick=TEXT), "required": ["name"]},
    "nullable": _object(name=TEXT, until={"anyOf": [WHOLE, {"type": "null"}]}),
    "union": _object(value={"anyOf": [WHOLE, TEXT]}),
    "variants": _object(pet={"anyOf": [_object(cat=YES), _object(dog=YES)]}),
    "ref": {**_object(home={"$ref": "#/$defs/town"}), "$defs": {"town": _object(town=TEXT)}},
    "pattern": _object(code={"type": "string", "pattern": "^[A-Z]{2}[0-9]{3}$"}),
    "date": _object(day={"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"}, title=TEXT),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("alpha", [0.0, 2.0])
def test_twenty_schemas_are_met(chat: ChatDetoxiGen, alpha: float, seed: int) -> None:
    formats = [{"type": "json_schema", "json_schema": {"schema": schema}} for schema in SCHEMAS.values()]
    model = chat.bind(alpha=alpha, calm_share=1.0, seed=seed, max_tokens=40)

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(model.ainvoke("Make one up.", response_format=form) for form in formats))

    for (name, schema), message in zip(SCHEMAS.items(), asyncio.run(all_at_once()), strict=True):
        jsonschema.validate(json.loads(message.text), schema)
        assert message.response_metadata["detox"]["alpha"] == alpha, name


def test_sixteen_share_one_batch(chat: ChatDetoxiGen, default_model: DetoxiGen) -> None:
    """The threads of `batch` are as many as its prompts, so the engine seats them all together."""
    seats, over = [], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            seats.append(default_model.stats().seats)

    watcher = threading.Thread(target=watch)
    watcher.start()
    replies = chat.batch([f"Tell me about the number {i}." for i in range(16)])
    over.set()
    watcher.join()
    assert len(replies) == max(seats) == 16


# -- retrieval


class Fixed(BaseRetriever):
    def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
        return [Document("The ferry to the island leaves at nine."), Document("Tickets are sold on board.")]


def test_a_rag_chain_streams_its_answer(chat: ChatDetoxiGen) -> None:
    pieces = list(create_detox_rag_chain(Fixed(), chat).stream("When does the ferry leave?"))
    assert "".join(piece.get("answer", "") for piece in pieces)
    assert len([piece for piece in pieces if "answer" in piece]) > 3
    (context,) = [piece["context"] for piece in pieces if "context" in piece]
    assert [one.metadata["toxicity_flagged"] for one in context] == [False, False]
