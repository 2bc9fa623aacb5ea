"""One's own model in one line, without a detoxifier: here a copy of the default under another name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from detox_guard import DetoxiGen
from detox_guard.models.default import default_backbone_dir

from langchain_detox_guard import ChatDetoxiGen, DetoxiGenLLM

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    original = default_backbone_dir()
    monkeypatch.setenv("DETOX_GUARD_CACHE", str(tmp_path / "cache"))  # nothing was trained there
    folder = tmp_path / "our-own-model"
    folder.mkdir()
    for file in original.iterdir():
        (folder / file.name).symlink_to(file)
    yield str(folder)
    DetoxiGen.shared(str(folder)).close()


def test_one_line_is_enough(own_model: str) -> None:
    (said,) = DetoxiGenLLM(model=own_model, max_tokens=4, seed=1).generate(["So, she is"]).generations[0]
    assert said.text
    assert said.generation_info is not None
    served = said.generation_info["detox"]["detoxifiers"]
    assert served
    assert all(":text:" in one for one in served)
    answer = ChatDetoxiGen(model=own_model, max_tokens=4, seed=1).invoke("Hello.")
    assert answer.response_metadata["detox"]["detoxifiers"] == served
