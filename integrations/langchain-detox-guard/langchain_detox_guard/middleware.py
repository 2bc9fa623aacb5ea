"""`DetoxMiddleware` for `langchain.agents.create_agent`. Knows requests, answers and tool results; decodes nothing.

Needs `pip install 'langchain-detox-guard[agents]'`.
"""

from __future__ import annotations

import asyncio
import operator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired

from detox_guard import GuardError, InvalidParamsError, screen
from detox_guard.text import strings_in
from langchain.agents.middleware.types import (
    AgentMiddleware,
    AgentState,
    ExtendedModelResponse,
    ModelRequest,
    ModelResponse,
    OmitFromInput,
)
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    RemoveMessage,
    ToolMessage,
    convert_to_messages,
)
from langchain_core.runnables.config import ensure_config, var_child_runnable_config
from langgraph.types import Command

from langchain_detox_guard._engine import PROVIDER
from langchain_detox_guard.chat import ChatDetoxiGen

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
    from contextlib import AbstractContextManager

    from detox_guard import GuardPolicy, Screened, ToxicityScorer
    from langgraph.prebuilt.tool_node import ToolCallRequest

Rung = float | Literal["rewrite"]

REWRITE = "Say the same again in a kind and respectful way, without any insult. Answer with the new text only."
REPLACEMENT = "I would rather not say that."
_NOSTREAM = "nostream"
"""LangGraph streams no tokens of a model run with this tag; what the node returns is streamed whole."""
_WORDS = ("text", "reasoning", "reasoning_content", "thinking", "summary", "refusal")
"""Where blocks of content, and what stands beside it, hold words besides the text and the calls."""


class DetoxState(AgentState[Any]):
    """The agent's state, with what the middleware did."""

    detox: NotRequired[Annotated[list[dict[str, Any]], OmitFromInput, operator.add]]  # LangGraph reads a last reducer
    """One record for each answer that was flagged or steered by a guard, and for each tool result that was flagged."""


class DetoxMiddleware(AgentMiddleware[DetoxState, Any, Any]):
    """Steers an agent's model, screens what its tools return, and checks what it answers before anyone reads it.

    Put it last in the list: a middleware behind it may change the model. Whatever answers is checked all the same, but
    only the model that came here is steered, and with `guard` another one's text would be streamed unchecked.

    `alpha`: strength of the steering in every call; None keeps the model's own. (It, `guard` and the ladder's numbers
    concern `ChatDetoxiGen`; the rest works with any chat model.)
    `tool_results`: what happens to a tool's result with a toxic sentence: "mask" that sentence, "drop" the result,
    "mark" it in the state only; None does not look. A result's artifact, which no model reads, is left as it is.
    Answers (their reasoning and the arguments of tool calls too) that score above `threshold` are asked for again, up
    the `ladder`: a number is an alpha, which is never lowered, "rewrite" shows the model its draft and asks for a
    kinder one. At its end, `on_exhausted`:
    "mask" the toxic sentences, "replace" the text by `replacement`, or "raise" `GuardError`. Tool calls stay calls:
    only strings in their arguments are masked. A structured answer that is still toxic raises.
    Until an answer is accepted none of it is streamed. With `guard`, a `GuardPolicy`, checking is left to the decoder
    instead: text streams on unit by unit, each scored before it is released, and the policy's ladder holds.
    `scorer` as in `detox_guard.load_scorer`. What was done stands in the state, under "detox".
    """

    state_schema = DetoxState

    def __init__(
        self,
        *,
        alpha: float | None = None,
        guard: GuardPolicy | None = None,
        tool_results: Literal["mask", "drop", "mark"] | None = "mask",
        scorer: str | ToxicityScorer | None = None,
        threshold: float = 0.5,
        ladder: Sequence[Rung] = (6.0, 9.0, "rewrite"),
        on_exhausted: Literal["mask", "replace", "raise"] = "mask",
        replacement: str = REPLACEMENT,
    ) -> None:
        super().__init__()
        if tool_results not in ("mask", "drop", "mark", None):
            raise InvalidParamsError("tool_results", tool_results, "mask, drop, mark or None")
        if on_exhausted not in ("mask", "replace", "raise"):
            raise InvalidParamsError("on_exhausted", on_exhausted, "mask, replace or raise")
        for i, rung in enumerate(ladder):
            if rung != "rewrite" and (isinstance(rung, bool | str) or not 0 <= rung <= 100):
                raise InvalidParamsError(f"ladder[{i}]", rung, 'an alpha from 0 to 100, or "rewrite"')
        self.alpha = alpha
        self.guard = guard
        self.tool_results = tool_results
        self.scorer = scorer
        self.threshold = threshold
        self.ladder = tuple(ladder)
        self.on_exhausted = on_exhausted
        self.replacement = replacement
        self._screen([""])  # a bad threshold or an unknown scorer is an error now

    # -- LangChain's hooks

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ExtendedModelResponse[Any]:
        """Call the model, again if need be, until its answer may be shown."""
        attempts = self._attempts(request)
        asked = _advance(attempts, None)
        while isinstance(asked, ModelRequest):
            with self._streaming(asked):
                answer = handler(asked)
            asked = _advance(attempts, answer)
        return asked

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ExtendedModelResponse[Any]:
        """The same; scoring happens off the event loop."""
        attempts = self._attempts(request)
        asked = _advance(attempts, None)
        while isinstance(asked, ModelRequest):
            with self._streaming(asked):
                answer = await handler(asked)
            asked = await asyncio.to_thread(_advance, attempts, answer)
        return asked

    def wrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], ToolMessage | Command[Any]]
    ) -> ToolMessage | Command[Any]:
        """Run the tool and screen its result, before the state and the model have it."""
        result: ToolMessage | Command[Any] = self._screened_result(handler(request))
        return result

    async def awrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]]
    ) -> ToolMessage | Command[Any]:
        """The same; scoring happens off the event loop."""
        return await asyncio.to_thread(self._screened_result, await handler(request))

    # -- answers

    def _streaming(self, request: ModelRequest[Any]) -> AbstractContextManager[None]:
        """Text may stream on while it is decoded under `guard`."""
        guarded = self.guard is not None and isinstance(request.model, ChatDetoxiGen)
        return nullcontext() if guarded else _held()

    def _attempts(
        self, request: ModelRequest[Any]
    ) -> Generator[ModelRequest[Any], ModelResponse[Any], ExtendedModelResponse[Any]]:
        """Yields what to ask the model, is sent its answers, and returns the one to show."""
        ours = isinstance(request.model, ChatDetoxiGen)
        if self.alpha is not None:
            request = _with(request, alpha=self.alpha)
        if self.guard is not None:
            request = _with(request, guard=self.guard)
        answer = yield request
        if self.guard is not None and _was_guarded(answer):
            return _reported(answer, [_record(answer, "guard")] if _interventions(answer) else [])
        records: list[dict[str, Any]] = []
        for rung in (rung for rung in self.ladder if ours or rung == "rewrite"):
            score = self._score(answer)
            if score <= self.threshold:
                return _reported(answer, records)
            records.append(_record(answer, "rewrite" if rung == "rewrite" else "again", score=score, rung=rung))
            answer = yield self._again(request, answer, rung)
        score = self._score(answer)
        if score <= self.threshold:
            return _reported(answer, records)
        records.append(_record(answer, self.on_exhausted, score=score))
        return _reported(self._exhausted(answer, score), records)

    def _again(self, request: ModelRequest[Any], answer: ModelResponse[Any], rung: Rung) -> ModelRequest[Any]:
        if rung != "rewrite":
            assert isinstance(request.model, ChatDetoxiGen)
            return _with(request, alpha=max(float(rung), request.model.alpha), calm_share=1.0)
        draft = _answer_of(answer)
        if draft.tool_calls:  # there is no text to say in another way: sample another call
            return request
        return request.override(messages=[*request.messages, AIMessage(draft.text), HumanMessage(REWRITE)])

    def _exhausted(self, answer: ModelResponse[Any], score: float) -> ModelResponse[Any]:
        if self.on_exhausted == "raise" or answer.structured_response is not None:
            raise GuardError(
                f"the answer scores {score:.2f}, over {self.threshold:g}, at the end of the ladder",
                hint="a higher alpha, a longer ladder, or on_exhausted='mask'",
            )
        message = _answer_of(answer)
        text = self._masked(message.text) if self.on_exhausted == "mask" else self.replacement
        # Text and calls only: blocks of content and the provider's own fields repeat the calls, or reason.
        clean = message.model_copy(
            update={
                "content": text if self._flagged(message.text) else str(message.text),
                "additional_kwargs": {},
                "tool_calls": [{**call, "args": self._mask_strings(call["args"])} for call in message.tool_calls],
                "invalid_tool_calls": [],
            }
        )
        return ModelResponse([clean if one is message else one for one in answer.result])

    def _score(self, answer: ModelResponse[Any]) -> float:
        """The worst of the answer's text and reasoning, and of the strings in its calls."""
        message = _answer_of(answer)
        texts = [message.text, *_beside_text(message), *strings_in([call["args"] for call in message.tool_calls])]
        texts += [str(call["args"]) for call in message.invalid_tool_calls]
        return max((one.score for one in self._screen([text for text in texts if text.strip()])), default=0.0)

    def _screen(self, texts: list[str]) -> list[Screened]:
        return screen(texts, scorer=self.scorer, threshold=self.threshold, action="mask")

    def _masked(self, text: str) -> str:
        return self._screen([text])[0].text or ""

    def _flagged(self, text: str) -> bool:
        return bool(text.strip()) and self._screen([text])[0].flagged

    def _mask_strings(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {key: self._mask_strings(part) for key, part in value.items()}
        if isinstance(value, list):
            return [self._mask_strings(part) for part in value]
        return self._masked(value) if isinstance(value, str) and self._flagged(value) else value

    # -- tool results

    def _screened_result(self, result: Any) -> Any:
        """A message or command, or a list of them: LangGraph's tools may return one, whatever the hook's type says."""
        if self.tool_results is None:
            return result
        if isinstance(result, list):
            return [self._screened_result(one) for one in result]
        if isinstance(result, ToolMessage):
            message, records = self._screened_message(result)
            return Command(update={"messages": [message], "detox": records}) if records else result
        if not isinstance(result.update, dict):
            return result
        messages, records = [], list[dict[str, Any]]()
        said = result.update.get("messages", ())
        for one in said if isinstance(said, list) else [said] if said else []:
            # Whatever role and form the tool gave it: the model reads it next.
            (message,) = [one] if isinstance(one, RemoveMessage) else convert_to_messages([one])
            message, found = self._screened_message(message)
            messages.append(message)
            records += found
        if not records:
            return result
        update = {**result.update, "messages": messages, "detox": [*result.update.get("detox", ()), *records]}
        return Command(graph=result.graph, update=update, resume=result.resume, goto=result.goto)

    def _screened_message(self, message: BaseMessage) -> tuple[BaseMessage, list[dict[str, Any]]]:
        """The message that may be read, and a record if it was flagged. A result of several blocks becomes one text."""
        if not message.text.strip():
            return message, []
        (one,) = screen(
            [message.text], scorer=self.scorer, threshold=self.threshold, action=self.tool_results or "mask"
        )
        if not one.flagged:
            return message, []
        record = {
            "where": "tool", "tool": message.name, "tool_call_id": getattr(message, "tool_call_id", None),
            "score": one.score, "action": self.tool_results,
        }  # fmt: skip
        if self.tool_results == "mark":
            return message, [record]
        kept = "[removed by the toxicity screen]" if one.text is None else one.text
        return message.model_copy(update={"content": kept}), [record]


def _advance(
    attempts: Generator[ModelRequest[Any], ModelResponse[Any], ExtendedModelResponse[Any]],
    answer: ModelResponse[Any] | None,
) -> ModelRequest[Any] | ExtendedModelResponse[Any]:
    """The next request, or the result. (No `StopIteration` may cross a thread.)"""
    try:
        return next(attempts) if answer is None else attempts.send(answer)
    except StopIteration as done:
        result: ExtendedModelResponse[Any] = done.value
        return result


def _with(request: ModelRequest[Any], **fields: Any) -> ModelRequest[Any]:
    """The request with a model that has these fields: if another middleware takes another model, they go with it."""
    if not isinstance(request.model, ChatDetoxiGen):
        return request
    return request.override(model=request.model._with(fields)[0])


@contextmanager
def _held() -> Iterator[None]:
    """Nothing is streamed of what any model says in here."""
    config = ensure_config()
    token = var_child_runnable_config.set({**config, "tags": [*config["tags"], _NOSTREAM]})
    try:
        yield
    finally:
        var_child_runnable_config.reset(token)


def _was_guarded(answer: ModelResponse[Any]) -> bool:
    """Whether it was decoded by us, under a guard."""
    told = _answer_of(answer).response_metadata
    return told.get("model_provider") == PROVIDER and told.get("detox", {}).get("guard") is not None


def _answer_of(answer: ModelResponse[Any]) -> AIMessage:
    """The model's message; another may follow it that acknowledges a structured answer."""
    return next((one for one in answer.result if isinstance(one, AIMessage)), AIMessage(""))


def _beside_text(message: AIMessage) -> list[str]:
    """What a message says outside of its text and calls: reasoning, above all."""
    blocks = [one for one in message.content if isinstance(one, dict)] if isinstance(message.content, list) else []
    blocks = [one["value"] if isinstance(one.get("value"), dict) else one for one in blocks]  # `non_standard` wraps it
    blocks = [one for one in blocks if one.get("type") != "text"]
    return [text for one in [*blocks, message.additional_kwargs] for key in _WORDS for text in strings_in(one.get(key))]


def _interventions(answer: ModelResponse[Any]) -> list[dict[str, Any]]:
    return list(_answer_of(answer).response_metadata.get("detox", {}).get("interventions", ()))


def _record(answer: ModelResponse[Any], action: str, **more: Any) -> dict[str, Any]:
    """What is told of one draft: never its text."""
    message = _answer_of(answer)
    used = {"alpha": message.response_metadata.get("detox", {}).get("alpha"), "message_id": message.id}
    return {"where": "answer", "action": action, **used, "interventions": _interventions(answer), **more}


def _reported(answer: ModelResponse[Any], records: list[dict[str, Any]]) -> ExtendedModelResponse[Any]:
    return ExtendedModelResponse(answer, Command(update={"detox": records}) if records else None)
