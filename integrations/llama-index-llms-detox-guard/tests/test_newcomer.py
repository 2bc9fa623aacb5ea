"""One's own model in one line, without a detoxifier: here a copy of the default under another name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from integrating import own_copy
from llama_index.core.llms import ChatMessage
from llama_index.llms.detox_guard import DetoxiGenLLM

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_one_line_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = DetoxiGenLLM(own_copy(tmp_path, monkeypatch), max_new_tokens=4, seed=1)
    said = llm.complete("So, she is")
    assert said.text
    assert said.raw is not None
    served = said.raw["detox"]["detoxifiers"]
    assert served
    assert all(":text:" in one for one in served)
    answer = llm.chat([ChatMessage("Hello.")])
    assert answer.raw is not None
    assert answer.raw["detox"]["detoxifiers"] == served
    llm.load().close()
