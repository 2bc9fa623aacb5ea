"""From a request of OpenAI's form to prompts and parameters of ours. Knows both forms; decodes nothing.

What a client may ask of the guard is decided here: stricter always, looser only where the server allows it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from detox_guard.errors import InvalidParamsError
from detox_guard.server.errors import ApiError
from detox_guard.text.grammar import Grammar
from detox_guard.text.prompts import ChatPrompt
from detox_guard.text.tools import tool_choice_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard.server.config import ServerConfig
    from detox_guard.server.schemas import ChatRequest, CompletionRequest, GuardOptions, SamplingRequest
    from detox_guard.settings import DecodingParams, GuardPolicy
    from detox_guard.text.prompts import Prompt

__all__ = ["Asked", "ask_chat", "ask_completion"]

_KEPT = ("temperature", "top_p", "top_k", "repetition_penalty")
_STEERING = ("alpha", "calm_share", "rule", "plausibility")
_LOOSER_IF_LARGER = ("threshold", "max_unit_tokens", "max_rewinds")
"""A larger threshold or unit lets more through; more rewinds only cost time."""
_OTHER_GUARD = ("unit", "context_chars", "on_exhausted", "scan_input", "keep_discarded")


@dataclass(frozen=True)
class Asked:
    """One request: what is decoded, and how the answer is told."""

    prompts: tuple[tuple[Prompt, DecodingParams], ...]
    """One for each choice of the answer, in order."""
    stream: bool
    usage: bool
    """A stream ends with its usage."""
    logprobs: bool
    """Each token's log probability, and those of `DecodingParams.trace_top` others."""
    trace: bool
    tools: tuple[dict[str, Any], ...] = ()
    parallel: bool = True
    each: int = 1
    """Choices of one prompt."""
    others: bool = True
    """Tokens that were not chosen may be told. No scorer saw them."""


def ask_chat(body: ChatRequest, base: DecodingParams, config: ServerConfig, *, loose: bool) -> Asked:
    """Raises `ApiError` and `InvalidParamsError`. `loose`: the client may loosen its guard."""
    if len(body.messages) > config.max_messages:
        raise ApiError(400, f"At most {config.max_messages} messages.", "too_many", param="messages")
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs: only with logprobs.", "invalid_value", param="top_logprobs")
    tools, grammar, schema = _held_to(body)
    messages = _told_of_schema(body.messages, schema)
    prompt = ChatPrompt(messages, tools, body.chat_template_kwargs or {})
    most = body.max_completion_tokens or body.max_tokens
    params = _params(body, base, config, most, loose=loose, logprobs=body.top_logprobs or 0 if body.logprobs else None)
    if grammar is not None:
        params = params.replace(grammar=grammar)
    return Asked(
        prompts=_choices([prompt], params, body, config),
        stream=bool(body.stream),
        usage=_usage(body),
        logprobs=bool(body.logprobs),
        trace=body.detox.trace,
        each=body.n or 1,
        others=loose or params.guard is None,
        tools=tools,
        parallel=body.parallel_tool_calls is not False,
    )


def ask_completion(body: CompletionRequest, base: DecodingParams, config: ServerConfig, *, loose: bool) -> Asked:
    """Raises `ApiError` and `InvalidParamsError`."""
    texts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    params = _params(body, base, config, body.max_tokens, loose=loose, logprobs=body.logprobs)
    return Asked(
        prompts=_choices(texts, params, body, config),
        stream=bool(body.stream),
        usage=_usage(body),
        logprobs=body.logprobs is not None,
        trace=body.detox.trace,
        each=body.n or 1,
        others=loose or params.guard is None,
    )


def _usage(body: SamplingRequest) -> bool:
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: only for a stream.", "invalid_value", param="stream_options")
    return body.stream_options is not None and body.stream_options.include_usage


def _choices(
    prompts: Sequence[Prompt], params: DecodingParams, body: SamplingRequest, config: ServerConfig
) -> tuple[tuple[Prompt, DecodingParams], ...]:
    each = body.n or 1
    if len(prompts) * each > config.max_choices:
        raise ApiError(400, f"At most {config.max_choices} replies a request.", "too_many", param="n")
    seeds = [None if params.seed is None else (params.seed + i) % 2**63 for i in range(each)]
    return tuple((prompt, params.replace(seed=seed)) for prompt in prompts for seed in seeds)


def _params(
    body: SamplingRequest,
    base: DecodingParams,
    config: ServerConfig,
    most: int | None,
    *,
    loose: bool,
    logprobs: int | None,
) -> DecodingParams:
    if most is not None and most > config.max_tokens:
        raise InvalidParamsError("max_tokens", most, f"at most {config.max_tokens} on this server")
    changes: dict[str, Any] = {name: getattr(body, name) for name in _KEPT}
    changes |= {name: getattr(body.detox, name) for name in _STEERING}
    changes = {name: value for name, value in changes.items() if value is not None}
    changes["max_new_tokens"] = most or min(base.max_new_tokens, config.max_tokens)
    changes["seed"] = base.seed if body.seed is None else body.seed % 2**63
    if body.stop is not None:
        changes["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    standing = config.guard if base.guard is None else base.guard
    changes["guard"] = _guard(body.detox.guard, standing, loose=loose)
    if logprobs and changes["guard"] is not None and not loose:
        raise _forbidden("top_logprobs", "this server tells no tokens that its guard has not seen")
    return base.replace(**changes, trace=logprobs is not None or body.detox.trace, trace_top=logprobs or 0)


def _guard(asked: bool | GuardOptions | None, standing: GuardPolicy | None, *, loose: bool) -> GuardPolicy | None:
    """The policy of one request: the server's, as the client changes it."""
    from detox_guard.settings import GuardPolicy

    if asked is None:
        return standing
    if asked is False:
        if standing is not None and not loose:
            raise _forbidden("detox.guard", "this server's guard cannot be switched off")
        return None
    policy = standing or GuardPolicy()
    if asked is True:
        return policy
    given = asked.model_dump(exclude_none=True)
    if standing is not None and not loose:
        for name, value in given.items():
            if name in _LOOSER_IF_LARGER and value <= getattr(standing, name):
                continue
            if name in _OTHER_GUARD and value == getattr(standing, name):
                continue
            raise _forbidden(f"detox.guard.{name}", "this server's guard can only be made stricter")
    elif asked.keep_discarded and not loose:
        raise _forbidden("detox.guard.keep_discarded", "this server does not tell what was taken back")
    return policy.replace(**given)


def _forbidden(param: str, why: str) -> ApiError:
    return ApiError(403, f"{param}: {why}.", "guard_is_fixed", param=param)


def _held_to(body: ChatRequest) -> tuple[tuple[dict[str, Any], ...], Grammar | None, dict[str, Any] | None]:
    """The tools to show, the grammar to hold to, and the schema to tell of."""
    tools = tuple(body.tools or ())
    mode, name = tool_choice_of(body.tool_choice, tools)
    kind = None if body.response_format is None else body.response_format.get("type")
    if kind not in (None, "text"):
        if mode == "any":
            raise InvalidParamsError("response_format", body.response_format, "not together with a forced tool call")
        if not tools or mode == "none":
            return (), *_formatted(body.response_format or {})
        raise InvalidParamsError(
            "response_format", body.response_format, "not together with tools", hint="tool_choice='none', or no tools"
        )
    if mode == "none":
        return (), None, None
    if mode == "auto":
        return tools, None, None
    return tools, Grammar.tool_calls(tools, name=name), None


def _formatted(response_format: dict[str, Any]) -> tuple[Grammar, dict[str, Any] | None]:
    if response_format.get("type") == "json_object":
        return Grammar.json_object(), None
    told = response_format.get("json_schema")
    schema = told.get("schema") if isinstance(told, dict) else None
    if response_format.get("type") != "json_schema" or not isinstance(schema, dict) or not isinstance(told, dict):
        raise InvalidParamsError("response_format", response_format, "OpenAI's text, json_object or json_schema")
    return Grammar.json_schema(schema, lenient=told.get("strict") is not True), schema


def _told_of_schema(messages: list[dict[str, Any]], schema: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A schema is told of in the system message: the grammar alone explains nothing."""
    if schema is None:
        return messages
    told = f"Answer only with JSON that fits this schema:\n{json.dumps(schema, ensure_ascii=False)}"
    first = messages[0]
    if first.get("role") in ("system", "developer") and isinstance(first.get("content"), str):
        return [{**first, "content": f"{first['content']}\n\n{told}"}, *messages[1:]]
    return [{"role": "system", "content": told}, *messages]
