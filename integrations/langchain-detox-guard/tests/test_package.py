"""The package from outside: its exports, what importing costs, and that its README runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import langchain_detox_guard

if TYPE_CHECKING:
    from detox_guard import DetoxiGen

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_every_export_exists() -> None:
    assert sorted(langchain_detox_guard.__all__) == langchain_detox_guard.__all__
    for name in langchain_detox_guard.__all__:
        assert getattr(langchain_detox_guard, name).__name__ == name
    with pytest.raises(AttributeError, match="nothing"):
        _ = langchain_detox_guard.nothing


def test_importing_needs_no_agents_and_loads_no_model() -> None:
    code = (
        "import sys, langchain_detox_guard as d; d.ChatDetoxiGen(); d.DetoxiGenLLM();"
        "print(sorted({'torch', 'langchain', 'langgraph', 'detox_guard.models.backbone'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_the_readme_runs(code: str, default_model: DetoxiGen, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
