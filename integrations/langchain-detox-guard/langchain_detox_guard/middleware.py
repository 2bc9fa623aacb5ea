"""`DetoxMiddleware` for `langchain.agents.create_agent`. Knows requests, answers and tool results; decodes nothing.

Needs `pip install 'langchain-detox-guard[agents]'`.
"""

from __future__ import annotations

import asyncio
import operator
from contextlib import nullcontext
from copy import deepcopy
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, Self

from detox_guard import SCREEN_NOTE, GuardError, GuardPolicy, InvalidParamsError
from langchain.agents.middleware.types import (
    AgentMiddleware,
    AgentState,
    ExtendedModelResponse,
    ModelRequest,
    ModelResponse,
    OmitFromInput,
)
from langchain.agents.structured_output import StructuredOutputError
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    ToolMessage,
)
from langgraph.types import Command

from langchain_detox_guard._identity import PROVIDER, policy_mark
from langchain_detox_guard._inside import models_in
from langchain_detox_guard._reading import Read, clean_call, read_words
from langchain_detox_guard._requests import all_ours, check_model, held, schemas_of, with_fields
from langchain_detox_guard._settings import refuse_scorer
from langchain_detox_guard._tool_results import ToolResults
from langchain_detox_guard._words import names_in, replaced
from langchain_detox_guard.chat import ChatDetoxiGen

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Sequence
    from contextlib import AbstractContextManager

    from detox_guard import ToxicityScorer
    from langgraph.prebuilt.tool_node import ToolCallRequest

Rung = float | Literal["rewrite"]
_Answer = ModelResponse[Any] | StructuredOutputError

REWRITE = "Say the same again in a kind and respectful way, without any insult. Answer with the new text only."
REPLACEMENT = "I would rather not say that."
_REFUSED = f"{SCREEN_NOTE} Give the answer again, without any insult."
"""Instead of a message that quotes an answer which may not be shown."""


class DetoxState(AgentState[Any]):
    """The agent's state, with what the middleware did."""

    detox: NotRequired[Annotated[list[dict[str, Any]], OmitFromInput, operator.add]]  # LangGraph reads a last reducer
    """One record for each answer that was flagged or steered by a guard, and for each tool result that was flagged."""


class DetoxMiddleware(AgentMiddleware[DetoxState, Any, Any]):
    """Steers an agent's model, screens what its tools return, and checks what it answers before anyone reads it.

    Put it last in the list: a middleware behind it may change the model. Whatever answers is checked all the same, but
    only the model that came here is steered, and with `guard` another one's text would be streamed unchecked.

    `alpha`: strength of the steering in every call; None keeps the model's own. (It, `guard` and the ladder's numbers
    concern `ChatDetoxiGen`, also inside what `bind`, `with_config`, `with_retry`, `with_fallbacks`, `configurable_…`
    and `|` put around it; the rest works with any chat model.) With `alpha` or `guard`, a model that cannot be looked
    into is refused: `InvalidParamsError`.
    `tool_results`: what happens to a tool's result with a toxic sentence, its artifact and what it puts into the state
    included: "mask" that sentence, "drop" the result, "mark" it in the state only; None does not look.
    Answers that score above `threshold` are asked for again, up the `ladder`: a number is an alpha, which is never
    lowered, "rewrite" shows the model its draft and asks for a kinder one. Every word is scored that a reader or a tool
    finds in the message, or in another that quotes it: text, reasoning and other blocks, names, ids, keys and strings
    of calls, and what a provider put beside them. At the ladder's end, `on_exhausted`: "mask" the toxic sentences,
    "replace" the text by `replacement`, or "raise" `GuardError`. Only text and calls are left of the message. Tool
    calls stay calls, their keys and strings masked; one of a tool whose toxic name the model made up is taken out. A
    structured answer that is still toxic raises.
    Until an answer is accepted none of it is streamed. With `guard`, a `GuardPolicy`, checking is left to the decoder
    instead: text streams on unit by unit, each scored before it is released, and the policy's ladder holds. An answer
    that was not decoded under it is held back and checked as above.
    `scorer` as in `detox_guard.load_scorer`. Its default and that of `threshold` are the guard's, if there is one, else
    the embedded scorer and .5. What was done stands in the state, under "detox".
    A deep copy shares a scorer object; with one, or a guard that has one, pickling raises `NotPicklableError`.
    """

    state_schema = DetoxState

    def __init__(
        self,
        *,
        alpha: float | None = None,
        guard: GuardPolicy | None = None,
        tool_results: Literal["mask", "drop", "mark"] | None = "mask",
        scorer: str | ToxicityScorer | None = None,
        threshold: float | None = None,
        ladder: Sequence[Rung] = (6.0, 9.0, "rewrite"),
        on_exhausted: Literal["mask", "replace", "raise"] = "mask",
        replacement: str = REPLACEMENT,
    ) -> None:
        super().__init__()
        if tool_results not in ("mask", "drop", "mark", None):
            raise InvalidParamsError("tool_results", tool_results, "mask, drop, mark or None")
        if on_exhausted not in ("mask", "replace", "raise"):
            raise InvalidParamsError("on_exhausted", on_exhausted, "mask, replace or raise")
        if not isinstance(ladder, list | tuple):
            raise InvalidParamsError("ladder", ladder, "a list of rungs")
        if not isinstance(replacement, str):
            raise InvalidParamsError("replacement", replacement, "a string")
        if scorer is not None and not isinstance(scorer, str) and not callable(getattr(scorer, "score", None)):
            raise InvalidParamsError("scorer", scorer, "a name, or an object with .name and .score()")
        for i, rung in enumerate(ladder):
            if rung != "rewrite" and (
                isinstance(rung, bool) or not isinstance(rung, int | float) or not 0 <= rung <= 100
            ):
                raise InvalidParamsError(f"ladder[{i}]", rung, 'an alpha from 0 to 100, or "rewrite"')
        self.alpha = alpha
        self.guard = guard
        self.tool_results = tool_results
        if guard is not None and not isinstance(guard, GuardPolicy):
            raise InvalidParamsError("guard", guard, "a GuardPolicy or None")
        if alpha is not None and (
            isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha <= 100
        ):
            raise InvalidParamsError("alpha", alpha, "a number from 0 to 100, or None")
        self.scorer = guard.scorer if scorer is None and guard is not None else scorer
        self.threshold = (guard or GuardPolicy()).threshold if threshold is None else threshold
        self.ladder = tuple(ladder)
        self.on_exhausted = on_exhausted
        self.replacement = replacement
        read_words("", self.scorer, self.threshold)  # a bad threshold or an unknown scorer is an error now

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        copy = type(self).__new__(type(self))
        memo[id(self)] = copy
        if self.scorer is not None:
            memo[id(self.scorer)] = self.scorer
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy

    def __getstate__(self) -> dict[str, Any]:
        """Raises `NotPicklableError`."""
        refuse_scorer(self.scorer)
        return self.__dict__

    # -- LangChain's hooks

    def wrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], ModelResponse[Any]]
    ) -> ExtendedModelResponse[Any]:
        """Call the model, again if need be, until its answer may be shown."""
        attempts = self._attempts(request)
        asked = _advance(attempts, None)
        while isinstance(asked, ModelRequest):
            answer: _Answer
            with self._streaming(asked):
                try:
                    answer = handler(asked)
                except StructuredOutputError as error:  # it quotes an answer that nobody has checked
                    answer = error
            asked = _advance(attempts, answer)
        return asked

    async def awrap_model_call(
        self, request: ModelRequest[Any], handler: Callable[[ModelRequest[Any]], Awaitable[ModelResponse[Any]]]
    ) -> ExtendedModelResponse[Any]:
        """The same; scoring happens off the event loop."""
        attempts = self._attempts(request)
        asked = _advance(attempts, None)
        while isinstance(asked, ModelRequest):
            answer: _Answer
            with self._streaming(asked):
                try:
                    answer = await handler(asked)
                except StructuredOutputError as error:
                    answer = error
            asked = await asyncio.to_thread(_advance, attempts, answer)
        return asked

    def wrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], ToolMessage | Command[Any]]
    ) -> ToolMessage | Command[Any]:
        """Run the tool and screen its result, before the state and the model have it."""
        result: ToolMessage | Command[Any] = self._tool_results.screened(handler(request))
        return result

    async def awrap_tool_call(
        self, request: ToolCallRequest, handler: Callable[[ToolCallRequest], Awaitable[ToolMessage | Command[Any]]]
    ) -> ToolMessage | Command[Any]:
        """The same; scoring happens off the event loop."""
        return await asyncio.to_thread(self._tool_results.screened, await handler(request))

    @property
    def _tool_results(self) -> ToolResults:
        return ToolResults(self.tool_results, self.scorer, self.threshold)

    # -- answers

    def _streaming(self, request: ModelRequest[Any]) -> AbstractContextManager[None]:
        """Text may stream on while it is decoded under `guard`."""
        guarded = self.guard is not None and all_ours(request)
        return nullcontext() if guarded else held()

    def _attempts(
        self, request: ModelRequest[Any]
    ) -> Generator[ModelRequest[Any], _Answer, ExtendedModelResponse[Any]]:
        """Yields what to ask the model, is sent its answers, and returns the one to show."""
        fields = {name: getattr(self, name) for name in ("alpha", "guard") if getattr(self, name) is not None}
        if fields:
            check_model(request.model)
            request = with_fields(request, **fields)
        known = names_in([*request.tools, *schemas_of(request.response_format)])
        answer = yield request
        if self.guard is not None and all_ours(request) and _was_guarded(answer, self.guard):
            done = _accepted(answer)
            return _reported(done, [_record(answer, "guard")] if _interventions(answer) else [])
        records: list[dict[str, Any]] = []
        ours = any(isinstance(model, ChatDetoxiGen) for model in models_in(request.model))
        for rung in (rung for rung in self.ladder if ours or rung == "rewrite"):
            read = self._read(answer, known)
            if read.score <= self.threshold:
                return _reported(_accepted(answer), records)
            records.append(_record(answer, "rewrite" if rung == "rewrite" else "again", score=read.score, rung=rung))
            answer = yield self._again(request, answer, rung)
        read = self._read(answer, known)
        if read.score <= self.threshold:
            return _reported(_accepted(answer), records)
        records.append(_record(answer, self.on_exhausted, score=read.score))
        return _reported(self._exhausted(answer, read), records)

    def _again(self, request: ModelRequest[Any], answer: _Answer, rung: Rung) -> ModelRequest[Any]:
        if rung != "rewrite":
            return with_fields(request, alpha=float(rung), calm_share=1.0)
        draft = _answer_of(answer)
        if draft.tool_calls or not draft.text.strip():
            return request  # there is no text to say in another way: sample again
        return request.override(messages=[*request.messages, AIMessage(draft.text), HumanMessage(REWRITE)])

    def _exhausted(self, answer: _Answer, read: Read) -> ModelResponse[Any]:
        if (
            self.on_exhausted == "raise"
            or isinstance(answer, StructuredOutputError)
            or answer.structured_response is not None
        ):
            raise GuardError(
                f"the answer scores {read.score:.2f}, over {self.threshold:g}, at the end of the ladder",
                hint="a higher alpha, a longer ladder, or on_exhausted='mask'",
            )
        message = _answer_of(answer)
        text = str(message.text)
        if read.flags(text):
            text = read.masked(text) if self.on_exhausted == "mask" else self.replacement
        # Text and calls only: blocks of content and the provider's own fields repeat the calls, or reason.
        calls = [clean_call(call, read) for call in message.tool_calls if not read.flags(call["name"])]
        ours = message.response_metadata.get("model_provider") == PROVIDER
        clean = AIMessage(
            text if text.strip() or calls else self.replacement,
            tool_calls=calls,
            name=None if message.name is None or read.flags(message.name) else message.name,
            id=None if read.flags({"id": message.id}, envelope=True) else message.id,
            usage_metadata=message.usage_metadata,
            response_metadata=message.response_metadata if ours else replaced(message.response_metadata, read.masked),
        )
        return ModelResponse([clean if one is message else _unquoting(one) for one in answer.result])

    def _read(self, answer: _Answer, known: frozenset[str]) -> Read:
        """The answer's words and what else quotes them, scored."""
        shown = _answer_of(answer) if isinstance(answer, StructuredOutputError) else [
            *answer.result, answer.structured_response
        ]  # fmt: skip
        return read_words(shown, self.scorer, self.threshold, known)


def _advance(
    attempts: Generator[ModelRequest[Any], _Answer, ExtendedModelResponse[Any]],
    answer: _Answer | None,
) -> ModelRequest[Any] | ExtendedModelResponse[Any]:
    """The next request, or the result. (No `StopIteration` may cross a thread.)"""
    try:
        return next(attempts) if answer is None else attempts.send(answer)
    except StopIteration as done:
        result: ExtendedModelResponse[Any] = done.value
        return result


def _unquoting(message: BaseMessage) -> BaseMessage:
    """Another message of the same answer, such as a tool's error: it may quote what was flagged."""
    return message.model_copy(update={"content": _REFUSED, "additional_kwargs": {}})


def _was_guarded(answer: _Answer, guard: GuardPolicy) -> bool:
    """Whether it was decoded by us, under this guard and no other of the same scorer."""
    told = _answer_of(answer).response_metadata
    detox = told.get("detox") or {}
    return (
        told.get("model_provider") == PROVIDER
        and bool(detox.get("guard"))
        and detox.get("policy") == policy_mark(guard)
    )


def _answer_of(answer: _Answer) -> AIMessage:
    """The model's message; another may follow it that acknowledges a structured answer."""
    if isinstance(answer, StructuredOutputError):
        return answer.ai_message
    return next((one for one in answer.result if isinstance(one, AIMessage)), AIMessage(""))


def _accepted(answer: _Answer) -> ModelResponse[Any]:
    """The answer, or the error that was raised about one that may be shown."""
    if isinstance(answer, StructuredOutputError):
        raise answer
    return answer


def _interventions(answer: _Answer) -> list[dict[str, Any]]:
    return list(_answer_of(answer).response_metadata.get("detox", {}).get("interventions", ()))


def _record(answer: _Answer, action: str, **more: Any) -> dict[str, Any]:
    """What is told of one draft: never its text."""
    message = _answer_of(answer)
    used = {"alpha": message.response_metadata.get("detox", {}).get("alpha"), "message_id": message.id}
    return {"where": "answer", "action": action, **used, "interventions": _interventions(answer), **more}


def _reported(answer: ModelResponse[Any], records: list[dict[str, Any]]) -> ExtendedModelResponse[Any]:
    return ExtendedModelResponse(answer, Command(update={"detox": records}) if records else None)
