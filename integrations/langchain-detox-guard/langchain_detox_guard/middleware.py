"""`DetoxMiddleware` for `langchain.agents.create_agent`. Knows requests, answers and tool results; decodes nothing.

Needs `pip install 'langchain-detox-guard[agents]'`.
"""

from __future__ import annotations

import asyncio
import operator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NotRequired, Self
from uuid import uuid4

from detox_guard import SCREEN_NOTE, GuardError, GuardPolicy, InvalidParamsError, screen
from langchain.agents.middleware.types import (
    AgentMiddleware,
    AgentState,
    ExtendedModelResponse,
    ModelRequest,
    ModelResponse,
    OmitFromInput,
)
from langchain.agents.structured_output import StructuredOutputError, ToolStrategy
from langchain_core.callbacks import BaseCallbackManager
from langchain_core.language_models.chat_models import BaseChatModel
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    RemoveMessage,
    ToolCall,
    ToolMessage,
    convert_to_messages,
)
from langchain_core.messages.tool import tool_call
from langchain_core.runnables.config import ensure_config, var_child_runnable_config
from langgraph.types import Command, Overwrite

from langchain_detox_guard._engine import PROVIDER, policy_mark
from langchain_detox_guard._inside import models_in, with_models
from langchain_detox_guard._settings import refuse_scorer
from langchain_detox_guard._words import names_in, replaced, words_of
from langchain_detox_guard.chat import ChatDetoxiGen

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterator, Sequence
    from contextlib import AbstractContextManager

    from detox_guard import Screened, ToxicityScorer
    from langchain_core.runnables import RunnableConfig
    from langgraph.prebuilt.tool_node import ToolCallRequest

Rung = float | Literal["rewrite"]
_Answer = ModelResponse[Any] | StructuredOutputError

REWRITE = "Say the same again in a kind and respectful way, without any insult. Answer with the new text only."
REPLACEMENT = "I would rather not say that."
_NOSTREAM = "nostream"
"""LangGraph streams no tokens of a model run with this tag; what the node returns is streamed whole."""
_REFUSED = f"{SCREEN_NOTE} Give the answer again, without any insult."
"""Instead of a message that quotes an answer which may not be shown."""


_DROPPED = object()
"""Instead of a value that does not come into the state."""


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
        self.threshold = (guard.threshold if guard is not None else 0.5) if threshold is None else threshold
        self.ladder = tuple(ladder)
        self.on_exhausted = on_exhausted
        self.replacement = replacement
        self._screen([""])  # a bad threshold or an unknown scorer is an error now

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
        guarded = self.guard is not None and _all_ours(request)
        return nullcontext() if guarded else _held()

    def _attempts(
        self, request: ModelRequest[Any]
    ) -> Generator[ModelRequest[Any], _Answer, ExtendedModelResponse[Any]]:
        """Yields what to ask the model, is sent its answers, and returns the one to show."""
        fields = {name: getattr(self, name) for name in ("alpha", "guard") if getattr(self, name) is not None}
        if fields:
            _check_model(request.model)
            request = _with(request, **fields)
        known = names_in([*request.tools, *_schemas_of(request.response_format)])
        answer = yield request
        if self.guard is not None and _all_ours(request) and _was_guarded(answer, self.guard):
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
            return _with(request, alpha=float(rung), calm_share=1.0)
        draft = _answer_of(answer)
        if draft.tool_calls or not draft.text.strip():
            return request  # there is no text to say in another way: sample again
        return request.override(messages=[*request.messages, AIMessage(draft.text), HumanMessage(REWRITE)])

    def _exhausted(self, answer: _Answer, read: _Read) -> ModelResponse[Any]:
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
        calls = [_clean_call(call, read) for call in message.tool_calls if not read.flags(call["name"])]
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

    def _read(self, answer: _Answer, known: frozenset[str]) -> _Read:
        """The answer's words and what else quotes them, scored."""
        shown = _answer_of(answer) if isinstance(answer, StructuredOutputError) else [
            *answer.result, answer.structured_response
        ]  # fmt: skip
        return self._scored(shown, known)

    def _scored(self, value: Any, known: frozenset[str] = frozenset()) -> _Read:
        words = words_of(value, known)
        return _Read(dict(zip(words, self._screen(words), strict=True)), known)

    def _screen(self, texts: list[str]) -> list[Screened]:
        return screen(texts, scorer=self.scorer, threshold=self.threshold, action="mask")

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
        update, records = dict(result.update), list[dict[str, Any]]()
        for key, value in result.update.items():
            if key == "messages":
                whole = isinstance(value, Overwrite)
                messages, found = self._screened_messages(value.value if whole else value)
                screened: Any = Overwrite(messages) if whole else messages
            elif key == "detox":
                continue
            else:
                screened, found = self._screened_value(key, value)
            if found:
                update[key] = screened
                records += found
        if not records:
            return result
        update = {key: value for key, value in update.items() if value is not _DROPPED}
        update["detox"] = [*result.update.get("detox", ()), *records]
        return Command(graph=result.graph, update=update, resume=result.resume, goto=result.goto)

    def _screened_messages(self, said: Any) -> tuple[list[BaseMessage], list[dict[str, Any]]]:
        """One or several messages, in any form that LangGraph takes."""
        many = isinstance(said, list) or (isinstance(said, tuple) and all(isinstance(one, BaseMessage) for one in said))
        messages, records = [], list[dict[str, Any]]()
        for one in said if many else [said] if said else []:
            # Whatever role and form the tool gave it: the model reads it next.
            (message,) = [one] if isinstance(one, RemoveMessage) else convert_to_messages([one])
            message, found = self._screened_message(message)
            messages.append(message)
            records += found
        return messages, records

    def _screened_value(self, key: str, value: Any) -> tuple[Any, list[dict[str, Any]]]:
        """What a tool puts elsewhere into the state."""
        read = self._scored(value)
        if not read.flagged:
            return value, []
        record = {"where": "tool", "key": key, "score": read.score, "action": self.tool_results}
        if self.tool_results == "mark":
            return value, [record]
        return _DROPPED if self.tool_results == "drop" else replaced(value, read.masked), [record]

    def _screened_message(self, message: BaseMessage) -> tuple[BaseMessage, list[dict[str, Any]]]:
        """The message that may be read, and a record if it was flagged. A result of several blocks becomes one text."""
        # Its tool's name is the developer's, its id that of the call.
        known = {one for one in (message.name, getattr(message, "tool_call_id", None)) if one is not None}
        read = self._scored(message, frozenset(known))
        if not read.flagged:
            return message, []
        record = {
            "where": "tool", "tool": message.name, "tool_call_id": getattr(message, "tool_call_id", None),
            "score": read.score, "action": self.tool_results,
        }  # fmt: skip
        if self.tool_results == "mark":
            return message, [record]
        drop = self.tool_results == "drop"
        kept: dict[str, Any] = {"content": message.content, "additional_kwargs": {}}
        kept["response_metadata"] = replaced(message.response_metadata, read.masked)
        if drop:
            kept["content"] = SCREEN_NOTE
        elif read.flags({"content": message.content}, envelope=True):
            text = str(message.text)
            # Flagged words outside of any text (a block of JSON, say) leave nothing to mask sentence by sentence.
            whole = isinstance(message.content, list) and not read.flags(text)
            kept["content"] = SCREEN_NOTE if whole else read.masked(text)
        if isinstance(message, ToolMessage):
            kept["artifact"] = None if drop else replaced(message.artifact, read.masked)
        if isinstance(message, AIMessage):
            kept["tool_calls"] = [_clean_call(call, read) for call in message.tool_calls]
            kept["invalid_tool_calls"] = []
        return message.model_copy(update=kept), [record]


@dataclass(frozen=True)
class _Read:
    """Words and their scores."""

    scores: dict[str, Screened]
    known: frozenset[str]

    @property
    def score(self) -> float:
        return max((one.score for one in self.scores.values()), default=0.0)

    @property
    def flagged(self) -> bool:
        return any(one.flagged for one in self.scores.values())

    def flags(self, value: object, *, envelope: bool = False) -> bool:
        """Whether any word in it is flagged; `envelope` as in `words_of`."""
        words = words_of(value, self.known, envelope=envelope)
        return any(word in self.scores and self.scores[word].flagged for word in words)

    def masked(self, text: str) -> str:
        """The text without its flagged sentences; without any of it, if it hides them."""
        if not self.flags(text):
            return text
        own = self.scores.get(text)
        hidden = [word for word in words_of(text, self.known) if word != text]
        if own is None or own.text is None or not own.flagged or self.flags(hidden):
            return SCREEN_NOTE
        return own.text


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


def _with(request: ModelRequest[Any], *, alpha: float | None = None, **fields: Any) -> ModelRequest[Any]:
    """The request with models that have these fields: if another middleware takes another model, they go with it.

    On the ladder (`calm_share` among the fields) an alpha is never lowered.
    """
    names = frozenset(fields) | (frozenset() if alpha is None else {"alpha"})

    def change(model: ChatDetoxiGen) -> ChatDetoxiGen:
        if alpha is None:
            return model._changed(fields)
        strength = max(alpha, model.alpha) if "calm_share" in fields else alpha
        return model._changed({**fields, "alpha": strength})

    settings = {name: value for name, value in request.model_settings.items() if name not in names}
    return request.override(model=with_models(request.model, change, names), model_settings=settings)


def _check_model(model: object) -> None:
    """Raise `InvalidParamsError` where a model of ours may stand that cannot be found."""
    found = models_in(model)
    if not any(isinstance(one, ChatDetoxiGen) for one in found) and not all(
        isinstance(one, BaseChatModel) for one in found
    ):
        kinds = ", ".join(sorted({type(one).__name__ for one in found}))
        raise InvalidParamsError(
            "model", kinds, "a chat model, or one that is bound, configured, retried or has fallbacks",
            hint="DetoxMiddleware cannot find the model inside: give the model itself its alpha and guard",
        )  # fmt: skip


def _all_ours(request: ModelRequest[Any]) -> bool:
    return all(isinstance(model, ChatDetoxiGen) for model in models_in(request.model))


def _schemas_of(response_format: Any) -> list[dict[str, Any]]:
    """The schemas of a structured answer, as tools."""
    if response_format is None:
        return []
    specs = getattr(response_format, "schema_specs", None)
    if specs is None and (spec := getattr(response_format, "schema_spec", None)) is not None:
        specs = [spec]
    if specs is None:
        specs = ToolStrategy(getattr(response_format, "schema", response_format)).schema_specs
    return [{"type": "function", "function": {"name": one.name, "parameters": one.json_schema}} for one in specs]


def _clean_call(call: ToolCall, read: _Read) -> ToolCall:
    """The call of the same tool, with the words masked."""
    own = uuid4().hex if read.flags({"id": call["id"]}, envelope=True) else call["id"]
    return tool_call(name=call["name"], args=replaced(call["args"], read.masked), id=own)


def _unquoting(message: BaseMessage) -> BaseMessage:
    """Another message of the same answer, such as a tool's error: it may quote what was flagged."""
    return message.model_copy(update={"content": _REFUSED, "additional_kwargs": {}})


@contextmanager
def _held() -> Iterator[None]:
    """Nothing is streamed of what any model says in here."""
    config = ensure_config()
    held: RunnableConfig = {**config, "tags": [*config["tags"], _NOSTREAM]}
    # Tags that are configured around a model take the place of those above; those of the callbacks are added to them.
    if isinstance(callbacks := config.get("callbacks"), BaseCallbackManager):
        held["callbacks"] = tagged = callbacks.copy()
        tagged.add_tags([_NOSTREAM], inherit=True)
    token = var_child_runnable_config.set(held)
    try:
        yield
    finally:
        var_child_runnable_config.reset(token)


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
