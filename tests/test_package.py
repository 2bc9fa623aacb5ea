"""The package from outside: what it exports, what importing it costs, and that the docs and examples run."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import detox_guard

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README_BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


def test_every_export_exists_and_nothing_else_is_promised() -> None:
    assert sorted(detox_guard.__all__) == detox_guard.__all__ == dir(detox_guard)
    for name in detox_guard.__all__:
        assert getattr(detox_guard, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = detox_guard.nothing


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, detox_guard; print(sorted({'torch', 'transformers', 'peft', 'numpy', 'rich'} & set(sys.modules)))"
    )
    assert python(code).strip() == "[]"


def test_every_error_is_in_the_tree_and_drawn() -> None:
    from detox_guard import errors

    for name in errors.__all__:
        assert issubclass(getattr(errors, name), detox_guard.DetoxGuardError)
        assert name in (errors.__doc__ or "")
        assert name in detox_guard.__all__


# LlamaIndex's workflows still read pydantic's old names.
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(path.read_text().splitlines()) < 80
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("code", README_BLOCKS, ids=range(len(README_BLOCKS)))
def test_the_readme_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_the_engine_knows_no_text_and_the_core_no_framework() -> None:
    package = ROOT / "detox_guard"
    for path in (package / "engine").glob("*.py"):
        assert not re.search(
            r"detox_guard\.(text|generation|trace|scoring|cli|training|evaluation)", path.read_text()
        ), path
    for path in package.rglob("*.py"):
        assert not re.search(r"^\s*(import|from) (langchain|llama_index)", path.read_text(), re.MULTILINE), path
