"""Prompts from arguments, files and pipes. Knows lines and JSONL; knows no tokenizer."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from detox_guard.errors import DataError, DetoxGuardError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from detox_guard.text.prompts import Prompt

__all__ = ["as_chat", "messages_of", "prompt_text", "read_prompts"]


def read_prompts(arguments: Sequence[str], file: Path | None) -> list[Prompt | DetoxGuardError]:
    """Prompts in order: the arguments ("-" is stdin), the file's, else stdin's.

    A file or pipe holds a prompt a line, or JSONL: objects with "prompt" or "messages" (a file is JSONL by its name
    `.jsonl`, a pipe by its first line). Blank lines are skipped. A line that cannot be used gives a `DataError` in its
    place. Raises `DataError` for what cannot be read, and if there is no prompt at all.
    """
    prompts: list[Prompt | DetoxGuardError] = []
    for argument in arguments:
        prompts += _lines(_stdin(), "stdin") if argument == "-" else [argument]
    if file is not None:
        try:
            data = file.read_bytes()
        except OSError as error:
            raise DataError(f"{file}: {error.strerror or error}") from error
        prompts += _lines(data, file.name, is_json=file.suffix.lower() in (".jsonl", ".ndjson"))
    if not arguments and file is None:
        prompts += _lines(_stdin(), "stdin")
    if not prompts:
        raise DataError("no prompts", hint="give some as arguments, in a --file, or through a pipe, one a line")
    return prompts


def as_chat(prompt: Prompt, system: str | None) -> Prompt:
    """The prompt as a user message; messages stay as they are, behind `system` if they bring none of their own."""
    messages: Any = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system is not None and isinstance(messages, list) and not any(_role(m) == "system" for m in messages):
        return [{"role": "system", "content": system}, *messages]
    chat: Prompt = messages
    return chat


def prompt_text(prompt: Prompt) -> str:
    """What to show for a prompt: its text, or that of the last message."""
    if isinstance(prompt, str):
        return prompt
    prompt = messages_of(prompt)
    last = prompt[-1] if isinstance(prompt, list | tuple) and prompt else None
    return str(last.get("content", "")) if isinstance(last, dict) else ""


def messages_of(prompt: Prompt) -> Any:
    """A chat's messages, without what goes with them."""
    return getattr(prompt, "messages", prompt)


def _role(message: Any) -> object:
    return message.get("role") if isinstance(message, dict) else None


def _stdin() -> bytes:
    # A test's or a closed stdin has no buffer.
    return (getattr(sys.stdin, "buffer", None) and sys.stdin.buffer.read()) or b""


def _lines(data: bytes, name: str, is_json: bool = False) -> list[Prompt | DetoxGuardError]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 (byte {error.start})") from None
    # Not splitlines(): a form feed or U+2028 inside a prompt ends no line.
    rows = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not is_json and rows:
        is_json = isinstance(_parsed(rows[0][1], f"{name}, line {rows[0][0]}"), str | list)
        is_json = is_json and rows[0][1].lstrip().startswith("{")
    return [_parsed(line, f"{name}, line {number}") if is_json else line for number, line in rows]


def _parsed(line: str, where: str) -> Prompt | DetoxGuardError:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return DataError(f"{where}: not JSON: {error}")
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        return DataError(f'{where}: not an object with "prompt" or "messages"')
    prompt = row["prompt"] if "prompt" in row else row["messages"]
    wanted = str if "prompt" in row else list
    if not isinstance(prompt, wanted):
        return DataError(f'{where}: "prompt" must be a string, "messages" a list')
    given: Prompt = prompt
    return given
