"""Prompts from arguments, files and pipes. Knows which rows are prompts; what is in them a tokenizer judges."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from detox_guard.data import parse_rows, read_rows
from detox_guard.errors import DataError, DetoxGuardError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from detox_guard.data import Rows
    from detox_guard.text.prompts import Prompt

__all__ = ["as_chat", "messages_of", "prompt_text", "read_prompts"]


def read_prompts(arguments: Sequence[str], file: Path | None) -> list[Prompt | DetoxGuardError]:
    """Prompts in order: the arguments ("-" is stdin), the file's, else stdin's.

    A file or pipe holds a prompt a line, or objects with "prompt" or "messages" (a file by its name, `.jsonl` or
    another that `detox_guard.data` knows; a pipe by its first line). A row that cannot be used gives a `DataError` in
    its place. Raises `DataError` for what cannot be read, and if there is no prompt at all.
    """
    prompts: list[Prompt | DetoxGuardError] = []
    for argument in arguments:
        prompts += _prompts(parse_rows(_stdin(), "stdin")) if argument == "-" else [argument]
    if file is not None:
        prompts += _prompts(read_rows(file, other=".txt"))
    if not arguments and file is None:
        prompts += _prompts(parse_rows(_stdin(), "stdin"))
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


def _prompts(rows: Rows) -> Iterator[Prompt | DetoxGuardError]:
    for row in rows.rows:
        value, where = row.value, rows.where(row)
        if row.bad:
            yield DataError(f"{where}: {row.bad}")
        elif isinstance(value, str):
            yield value
        elif not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
            yield DataError(f'{where}: not an object with "prompt" or "messages"')
        elif not isinstance(prompt := value.get("prompt", value.get("messages")), str if "prompt" in value else list):
            yield DataError(f'{where}: "prompt" must be a string, "messages" a list')
        else:
            yield prompt
