"""One's own model in one line, without a detoxifier: here a copy of the default under another name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from detox_guard import DetoxiGen
from integrating import own_copy

from langchain_detox_guard import ChatDetoxiGen, DetoxiGenLLM

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_one_line_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = own_copy(tmp_path, monkeypatch)
    (said,) = DetoxiGenLLM(model=model, max_tokens=4, seed=1).generate(["So, she is"]).generations[0]
    assert said.text
    assert said.generation_info is not None
    served = said.generation_info["detox"]["detoxifiers"]
    assert served
    assert all(":text:" in one for one in served)
    answer = ChatDetoxiGen(model=model, max_tokens=4, seed=1).invoke("Hello.")
    assert answer.response_metadata["detox"]["detoxifiers"] == served
    DetoxiGen.shared(model).close()
