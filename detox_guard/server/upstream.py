"""A model behind another endpoint of OpenAI's form, guarded and not steered. Knows that form as a client; no
route.

What comes is held until each unit of it is scored (`guard_text`). Calls of tools are read as text in the one form that
a guard decodes string by string, and become calls again in the answer.
"""

from __future__ import annotations

import json
import ssl
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import httpx

from detox_guard._threads import run_off_loop
from detox_guard.errors import EngineBusyError, EngineClosedError, GuardError, InvalidParamsError
from detox_guard.guard.reply import scan
from detox_guard.guard.stream import aguard_text
from detox_guard.results import Chunk, Generation, Steering, Usage
from detox_guard.scorers.base import load_scorer
from detox_guard.server.errors import ApiError
from detox_guard.settings import DecodingParams
from detox_guard.text.prompts import ChatPrompt, prompt_texts

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from detox_guard.results import Finish, Intervention
    from detox_guard.text.prompts import Prompt

__all__ = ["Upstream"]

_CALL = "<tool_call>\n{}\n</tool_call>"


class Upstream:
    """One model of an endpoint such as `http://127.0.0.1:11434/v1` (Ollama, vLLM, llama-server)."""

    detoxifier_ids: tuple[str, ...] = ()
    context_window: int | None = None
    has_chat_template = supports_tools = True
    tells_tokens = False
    """Its text comes without the figures of its tokens."""

    def __init__(self, url: str, model: str | None = None, *, key: str | None = None, timeout_s: float = 600.0) -> None:
        """`model`: its name there; None asks for the first one. Raises `InvalidParamsError` for a URL that is none, and
        `ApiError` where nobody answers.
        """
        if httpx.URL(url).scheme not in ("http", "https"):
            raise InvalidParamsError("upstream", url, "an address that begins with http:// or https://")
        self._url = url.rstrip("/")
        self._headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._timeout = httpx.Timeout(timeout_s, connect=10.0)
        self._tls: Any = ssl.create_default_context()
        self.params = DecodingParams(alpha=0.0, top_p=1.0)
        self.closed = False
        self.model_id = model or self._first()

    async def astream(
        self, prompt: Prompt, params: DecodingParams | None = None, **changes: Any
    ) -> AsyncGenerator[Chunk, None]:
        """The reply, unit by unit under a guard. Closing it hangs up there. Raises `ApiError`, `GuardError`,
        `ScorerError`, `EngineError`, and `InvalidParamsError` for an alpha above 0.
        """
        params = (params or self.params).replace(**changes)
        if params.alpha > 0:
            raise InvalidParamsError("alpha", params.alpha, "0: a model behind another endpoint is not steered")
        if self.closed:
            raise EngineClosedError("the model was closed")
        taken: list[Intervention] = []
        told = _Told()
        guard = params.guard
        if guard is not None and guard.scan_input:
            score = await run_off_loop(scan, prompt_texts(prompt), guard)
            if score > guard.threshold:
                if guard.on_exhausted == "raise":
                    raise GuardError(f"the prompt scored {score:.2f}, over {guard.threshold:g}")
                text = guard.replacement if guard.on_exhausted == "replace" else ""
                yield Chunk(text, _generation(params, told, text, "guard", taken))
                return
        raw = self._said(_body(self.model_id, prompt, params), told, chat=not isinstance(prompt, str))
        pieces: list[str] = []
        async with aclosing(raw):
            passed: AsyncGenerator[str, None] = raw if guard is None else aguard_text(raw, guard, taken.append)
            async with aclosing(passed):
                async for text in passed:
                    pieces.append(text)
                    yield Chunk(text)
        yield Chunk("", _generation(params, told, "".join(pieces), "guard" if taken else told.reason or "stop", taken))

    def close(self) -> None:
        """It answers nobody any more."""
        self.closed = True

    def _first(self) -> str:
        try:
            answer = httpx.get(f"{self._url}/models", headers=self._headers, timeout=10.0, verify=self._tls)
            answer.raise_for_status()
            return str(answer.json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise InvalidParamsError(
                "upstream", self._url, f"an endpoint that lists models ({type(error).__name__})", hint="name the model"
            ) from None

    async def _said(self, body: dict[str, Any], told: _Told, *, chat: bool) -> AsyncGenerator[str, None]:
        """The text as it comes; calls of tools at its end."""
        path = "chat/completions" if chat else "completions"
        try:
            async with (
                httpx.AsyncClient(timeout=self._timeout, headers=self._headers, verify=self._tls) as client,
                client.stream("POST", f"{self._url}/{path}", json=body) as response,
            ):
                if response.status_code != 200:
                    raise _refused(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    if line.startswith("data:") and (text := told.read(line[5:].strip())):
                        yield text
        except httpx.HTTPError:
            raise _failed("does not answer") from None
        if told.reason is None:
            raise _failed("broke off")
        for call in told.calls.values():
            try:
                arguments = json.loads(call["arguments"] or "{}")
            except ValueError:
                arguments = call["arguments"]
            yield _CALL.format(json.dumps({"name": call["name"], "arguments": arguments}, ensure_ascii=False))


class _Told:
    """What a stream tells besides its text."""

    def __init__(self) -> None:
        self.reason: Finish | None = None
        self.calls: dict[int, dict[str, str]] = {}
        self.usage: dict[str, Any] = {}
        self._pieces = 0

    def read(self, data: str) -> str:
        """The text of one event. Raises `ApiError` for what is none."""
        if data == "[DONE]":
            return ""
        try:
            event = json.loads(data)
            if "error" in event:
                raise _failed("reports an error")
            self.usage = event.get("usage") or self.usage
            for choice in event["choices"][:1]:
                if choice.get("finish_reason"):
                    self.reason = "length" if choice["finish_reason"] == "length" else "stop"
                delta = choice.get("delta") or {}
                for call in delta.get("tool_calls") or ():
                    self._take(call)
                self._pieces += 1
                return str(choice.get("text") or delta.get("content") or "")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise _failed("says what is no stream of OpenAI's form") from None
        return ""

    def counted(self) -> Usage:
        """Its own figures, or how many pieces came."""
        read, written = self.usage.get("prompt_tokens"), self.usage.get("completion_tokens")
        return Usage(int(read or 0), int(self._pieces if written is None else written))

    def _take(self, call: dict[str, Any]) -> None:
        own = self.calls.setdefault(int(call.get("index") or 0), {"name": "", "arguments": ""})
        for name in own:
            own[name] += (call.get("function") or {}).get(name) or ""


def _body(model: str, prompt: Prompt, params: DecodingParams) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": params.max_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
    }
    if params.seed is not None:
        body["seed"] = params.seed
    if params.stop:
        body["stop"] = list(params.stop)
    if isinstance(prompt, str):
        return {**body, "prompt": prompt}
    chat = prompt if isinstance(prompt, ChatPrompt) else ChatPrompt(prompt)
    body["messages"] = list(chat.messages)
    if chat.tools:
        body["tools"] = list(chat.tools)
    if params.grammar is not None and params.grammar.kind == "tool_calls":
        offered = json.loads(params.grammar.body)
        one = {"type": "function", "function": {"name": offered[0][0]}}
        body["tool_choice"] = one if len(offered) < len(chat.tools) else "required"
    elif params.grammar is not None:
        schema = {"name": "answer", "schema": json.loads(params.grammar.body)}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


def _generation(
    params: DecodingParams, told: _Told, text: str, reason: Finish, taken: list[Intervention]
) -> Generation:
    return Generation(
        text=text,
        finish_reason=reason,
        usage=told.counted(),
        seed=params.seed or 0,
        trace=None,
        steering=Steering(0.0, params.rule, (), 0.0, 0.0, 0, 0),
        interventions=tuple(taken),
        guard=None if params.guard is None else load_scorer(params.guard.scorer).name,
    )


def _refused(status: int, body: bytes) -> Exception:
    if status == 429:
        return EngineBusyError("the engine behind this server is busy")
    if status in (400, 404, 413, 422):
        try:
            message = str(json.loads(body)["error"]["message"])
        except (ValueError, LookupError, TypeError):
            message = "it does not say why"
        return ApiError(400, f"The engine behind this server refuses the request: {message[:500]}", "upstream_refused")
    return _failed(f"answers with {status}")


def _failed(how: str) -> ApiError:
    return ApiError(502, f"The engine behind this server {how}.", "upstream_failed")
