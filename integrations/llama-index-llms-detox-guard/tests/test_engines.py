"""Query and chat engines with a guarded LLM, a guarded synthesizer, or both."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from llama_index.core import Document, Settings, VectorStoreIndex
from llama_index.core.base.llms.types import CompletionResponse
from llama_index.core.chat_engine import (
    CondensePlusContextChatEngine,
    CondenseQuestionChatEngine,
    ContextChatEngine,
    SimpleChatEngine,
)
from llama_index.core.indices.query.query_transform import HyDEQueryTransform
from llama_index.core.llms import ChatMessage
from llama_index.core.query_engine import RetrieverQueryEngine, TransformQueryEngine
from llama_index.core.response_synthesizers import get_response_synthesizer
from llama_index.llms.detox_guard import (
    DetoxiGenLLM,
    DetoxNodePostprocessor,
    get_detox_response_synthesizer,
    guard_chat_engine,
)
from llama_index_harness import CLEAN, HELD, POLICY, QUERY, BagEmbedding, ForeignLLM, memory, recorded_events, scripted

from detox_guard import InvalidParamsError, PromptTooLongError
from detox_guard.testing import ScriptedScorer

ENGINES = {"context": ContextChatEngine, "condense_plus_context": CondensePlusContextChatEngine}


@pytest.fixture
def index() -> VectorStoreIndex:
    documents = [Document(text="The library opens at nine."), Document(text="It closes at six. How stupid.")]
    return VectorStoreIndex.from_documents(documents, embed_model=BagEmbedding())


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
async def test_settings_llm_and_an_untouched_query_engine(index: VectorStoreIndex, streaming: bool) -> None:
    model = scripted()
    Settings.llm = DetoxiGenLLM(detoxigen=model, guard=POLICY)
    query_engine = index.as_query_engine(streaming=streaming)
    assert str(query_engine.query(QUERY)) == CLEAN
    response = await query_engine.aquery(QUERY)
    if streaming:
        assert "".join([delta async for delta in response.response_gen]) == CLEAN
    else:
        assert str(response) == CLEAN
    assert len(model.calls) == 2
    assert all(params.guard == POLICY for *_, params in model.calls)


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "foreign"])
async def test_query_engine_with_the_hook(index: VectorStoreIndex, ours: bool) -> None:
    llm = DetoxiGenLLM(detoxigen=scripted()) if ours else ForeignLLM()
    synthesizer = get_detox_response_synthesizer(llm, policy=POLICY)
    query_engine = index.as_query_engine(llm=llm, response_synthesizer=synthesizer)
    for response in (query_engine.query(QUERY), await query_engine.aquery(QUERY)):
        assert str(response) == (CLEAN if ours else HELD)
        assert len(response.metadata["detox"]["screened"]) == 1
        assert len(response.source_nodes) == 2
        assert not any("stupid" in node.get_content() for node in response.source_nodes)


def test_query_engine_with_the_postprocessor(index: VectorStoreIndex) -> None:
    model = scripted()
    query_engine = index.as_query_engine(
        llm=DetoxiGenLLM(detoxigen=model),
        node_postprocessors=[DetoxNodePostprocessor(action="drop", scorer=ScriptedScorer("stupid"))],
    )
    assert len(query_engine.query(QUERY).source_nodes) == 1
    assert "six" not in str(model.calls[0].prompt)


async def test_eight_queries_are_under_way_together(index: VectorStoreIndex) -> None:
    model = scripted(together=8)
    llm = DetoxiGenLLM(detoxigen=model)
    synthesizer = get_detox_response_synthesizer(llm, policy=POLICY)
    query_engine = index.as_query_engine(llm=llm, response_synthesizer=synthesizer)
    await asyncio.gather(*(query_engine.aquery(QUERY) for _ in range(8)))
    assert model.most_active == 8


def chat_engine(mode: str, index: VectorStoreIndex, llm: Any) -> Any:
    return ENGINES[mode].from_defaults(
        retriever=index.as_retriever(), llm=llm, memory=memory(), system_prompt="Be brief."
    )


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "foreign"])
@pytest.mark.parametrize("mode", ENGINES)
async def test_chat_engines(index: VectorStoreIndex, mode: str, ours: bool) -> None:
    fake = scripted()
    llm = DetoxiGenLLM(detoxigen=fake) if ours else ForeignLLM()
    engine = guard_chat_engine(chat_engine(mode, index, llm), policy=POLICY)
    expected = CLEAN if ours else HELD
    assert str(engine.chat(QUERY)) == expected
    assert str(await engine.achat("And on Monday?")) == expected
    assert "".join(engine.stream_chat("And on Tuesday?").response_gen) == expected
    response = await engine.astream_chat("And on Sunday?")
    assert "".join([delta async for delta in response.async_response_gen()]) == expected
    assert not any("stupid" in node.get_content() for node in response.source_nodes)
    assert [message.content for message in engine.chat_history if message.role == "assistant"] == [expected] * 4
    if ours:
        assert all(params.guard == POLICY for *_, params in fake.calls)  # of a condensed question too
        answers = [params for *_, params in fake.calls if params.alpha == 6.0]
        assert len(answers) == 4  # the context was toxic before it was masked


@pytest.mark.parametrize("mode", ENGINES)
def test_chat_engines_without_screening(index: VectorStoreIndex, mode: str) -> None:
    engine = guard_chat_engine(chat_engine(mode, index, ForeignLLM()), policy=POLICY, context=None)
    response = engine.chat(QUERY)
    assert str(response) == HELD
    assert any("stupid" in node.get_content() for node in response.source_nodes)


@pytest.mark.parametrize("mode", ENGINES)
def test_chat_engines_keep_the_guard_of_their_llm(index: VectorStoreIndex, mode: str) -> None:
    fake, strict = scripted(), POLICY.replace(threshold=0.05)
    llm = DetoxiGenLLM(detoxigen=fake, guard=strict)
    response = guard_chat_engine(chat_engine(mode, index, llm)).chat(QUERY)
    assert fake.calls[-1].params.guard == strict
    assert len(response.source_nodes) == 2
    assert all("detox_guard" in node.metadata for node in response.source_nodes)


@pytest.mark.parametrize("bad", [{"context": "hide"}, {"context_threshold": 1.5}])
def test_a_bad_option_of_a_chat_engine_is_named(index: VectorStoreIndex, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        guard_chat_engine(chat_engine("context", index, ForeignLLM()), **bad)


@pytest.mark.parametrize("hook", [False, True], ids=["plain", "hook"])
@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "stream"])
async def test_a_prompt_that_is_too_long_is_no_empty_response(
    index: VectorStoreIndex, streaming: bool, hook: bool
) -> None:
    llm = DetoxiGenLLM(detoxigen=scripted([PromptTooLongError("prompt", 4096, "at most 2048 positions")]))
    build = get_detox_response_synthesizer if hook else get_response_synthesizer
    options = {"policy": POLICY} if hook else {}
    query_engine = RetrieverQueryEngine(index.as_retriever(), build(llm=llm, streaming=streaming, **options))

    async def text_of_the_answer() -> str:
        response = await query_engine.aquery(QUERY)
        return "".join([delta async for delta in response.response_gen]) if streaming else str(response)

    with pytest.raises(PromptTooLongError, match="2048"):
        str(query_engine.query(QUERY))
    with pytest.raises(PromptTooLongError, match="2048"):
        await text_of_the_answer()


def test_a_simple_chat_engine_remembers() -> None:
    fake = scripted()
    engine = SimpleChatEngine.from_defaults(llm=DetoxiGenLLM(detoxigen=fake), memory=memory())
    assert str(engine.chat("Hello")) == CLEAN
    assert "".join(engine.stream_chat("Again").response_gen) == CLEAN
    assert len(fake.calls[1].prompt.messages) == 3


def test_events_of_a_query_come_exactly_once(index: VectorStoreIndex) -> None:
    llm = DetoxiGenLLM(detoxigen=scripted())
    synthesizer = get_detox_response_synthesizer(llm, policy=POLICY)
    with recorded_events() as events:
        index.as_query_engine(llm=llm, response_synthesizer=synthesizer).query(QUERY)
    for name in ("LLMChatStartEvent", "LLMChatEndEvent", "SynthesizeStartEvent", "SynthesizeEndEvent"):
        assert len(events.named(name)) == 1, name
    assert len(events.named("DetoxScreeningEvent")) == 1
    end = events.named("SynthesizeEndEvent")[0]
    assert not any("stupid" in node.get_content() for node in end.response.source_nodes)


def test_history_from_another_llm_is_understood() -> None:
    fake = scripted()
    history = [ChatMessage("Hi"), ChatMessage(role="assistant", content="Hello.")]
    DetoxiGenLLM(detoxigen=fake).chat([*history, ChatMessage("When?")])
    assert [message["role"] for message in fake.calls[0].prompt.messages] == ["user", "assistant", "user"]


# -- what is written on the way


class Rewrites(ForeignLLM):
    """Rewrites a question, and answers, in words of its own."""

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        question = "tandalone question" in prompt
        return CompletionResponse(text="How stupid. When is noon?" if question else CLEAN)

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        yield CompletionResponse(text=CLEAN, delta=CLEAN)


def condensing(mode: str, index: VectorStoreIndex, llm: Any) -> Any:
    if mode == "condense_plus_context":
        return chat_engine(mode, index, llm)
    query_engine = index.as_query_engine(llm=llm)
    return CondenseQuestionChatEngine.from_defaults(query_engine=query_engine, llm=llm, memory=memory())


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "foreign"])
@pytest.mark.parametrize("mode", ["condense_plus_context", "condense_question"])
async def test_a_condensed_question_is_judged(
    index: VectorStoreIndex, mode: str, ours: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    fake = scripted()
    engine = guard_chat_engine(
        condensing(mode, index, DetoxiGenLLM(detoxigen=fake) if ours else Rewrites()), policy=POLICY
    )
    engine.chat(QUERY)
    for response in (engine.chat("And at noon?"), await engine.achat("And at noon?")):
        assert "stupid" not in str(response)
        (told,) = response.sources[0].raw_input.values()
        assert told == (CLEAN if ours else "[removed] When is noon?")
        assert "stupid" not in repr(response.source_nodes)
    assert "stupid" not in caplog.text
    if ours:
        assert all(params.guard == POLICY for *_, params in fake.calls)
        assert len(fake.calls) == 5
    assert "".join(engine.stream_chat("And at six?").response_gen) == CLEAN
    response = await engine.astream_chat("And at six?")
    assert "".join([piece async for piece in response.async_response_gen()]) == CLEAN


@pytest.mark.parametrize("mode", ["condense_plus_context", "condense_question"])
async def test_a_flagged_message_is_condensed_by_no_foreign_llm(index: VectorStoreIndex, mode: str) -> None:
    asked: list[str] = []

    class Keeps(Rewrites):
        def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
            asked.append(prompt)
            return super().complete(prompt, formatted, **kwargs)

    engine = guard_chat_engine(condensing(mode, index, Keeps()), policy=POLICY.replace(scan_input=True))
    engine.chat(QUERY)
    asked.clear()
    assert str(engine.chat("Who is stupid?")) == "[removed]"
    assert str(await engine.achat("Who is stupid?")) == "[removed]"
    assert asked == []


def test_the_history_of_a_chat_is_scanned(index: VectorStoreIndex) -> None:
    engine = guard_chat_engine(chat_engine("context", index, ForeignLLM()), policy=POLICY.replace(scan_input=True))
    history = [ChatMessage("You are stupid."), ChatMessage(role="assistant", content="No.")]
    assert str(engine.chat(QUERY, chat_history=history)) == "[removed]"


def test_the_query_engine_of_a_condensing_chat_stays_as_it_is(index: VectorStoreIndex) -> None:
    query_engine = index.as_query_engine(llm=ForeignLLM())
    chat = CondenseQuestionChatEngine.from_defaults(query_engine=query_engine, llm=ForeignLLM(), memory=memory())
    assert str(guard_chat_engine(chat, policy=POLICY).chat(QUERY)) == HELD
    assert "stupid" in str(query_engine.query(QUERY))


def test_an_engine_that_cannot_be_guarded_is_named(index: VectorStoreIndex) -> None:
    simple = SimpleChatEngine.from_defaults(llm=ForeignLLM(), memory=memory())
    chat = CondenseQuestionChatEngine.from_defaults(
        query_engine=TransformQueryEngine(index.as_query_engine(llm=ForeignLLM()), HyDEQueryTransform(ForeignLLM())),
        llm=ForeignLLM(),
        memory=memory(),
    )
    for engine in (simple, chat):
        with pytest.raises(InvalidParamsError, match="engine"):
            guard_chat_engine(engine, policy=POLICY)  # type: ignore[type-var]
