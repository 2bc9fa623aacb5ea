"""The package from outside: what it exports, what importing it costs, and that the docs and examples run."""

from __future__ import annotations

import ast
import gc
import importlib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import detox_guard

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = {
    f"{page.stem}-{i}": code
    for page in PAGES
    for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL))
}


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_is_shown_as_code(page: Path) -> None:
    """The site wants one word behind a fence, or none: what is marked `python` runs in the tests, `py` does not."""
    fences = re.findall(r"^```.*$", page.read_text("utf-8"), re.MULTILINE)
    assert [fence for fence in fences if not re.fullmatch(r"```\w*", fence)] == []


def test_every_export_exists_and_nothing_else_is_promised() -> None:
    assert sorted(set(detox_guard.__all__)) == detox_guard.__all__ == dir(detox_guard)
    for name in detox_guard.__all__:
        assert getattr(detox_guard, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = detox_guard.nothing


def test_type_checkers_read_the_same_names() -> None:
    tree = ast.parse(Path(str(detox_guard.__file__)).read_text("utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    read = {
        str(name.asname): f"{source.module}.{name.name}"
        for source in block.body
        if isinstance(source, ast.ImportFrom)
        for name in source.names
    }
    assert sorted([*read, "__version__"]) == detox_guard.__all__
    for name, place in read.items():
        module, _, last = place.rpartition(".")
        assert last == name
        assert getattr(importlib.import_module(module), name) is getattr(detox_guard, name)


def test_importing_loads_nothing_and_settings_no_model() -> None:
    heavy = "{'torch', 'transformers', 'peft', 'numpy', 'rich', 'jinja2', 'safetensors', 'huggingface_hub'}"
    assert python(f"import sys, detox_guard; print({heavy} & set(sys.modules), 'pydantic' in sys.modules)") == (
        "set() False\n"
    )
    names = "DecodingParams, GuardPolicy, EngineConfig, Grammar, ToolCall, Generation, DetoxGuardError"
    assert python(f"import sys; from detox_guard import {names}; print({heavy} & set(sys.modules))") == "set()\n"


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import detox_guard.models.backbone", "{'torch', 'transformers'}"),
        ("import detox_guard.detoxifiers.soft_prompt, detox_guard.training", "{'torch', 'transformers', 'peft'}"),
        (
            "from detox_guard import load_scorer; load_scorer().score(['a'])",
            "{'torch', 'transformers', 'sklearn', 'scipy'}",
        ),
    ],
)
def test_what_needs_no_model_loads_none(code: str, heavy: str) -> None:
    assert python(f"import sys; {code}; print({heavy} & set(sys.modules))") == "set()\n"


def test_every_error_is_in_the_tree_and_drawn() -> None:
    from detox_guard import errors

    for name in errors.__all__:
        assert issubclass(getattr(errors, name), detox_guard.DetoxGuardError)
        assert name in (errors.__doc__ or "")
        assert name in detox_guard.__all__


# LlamaIndex's workflows still read pydantic's old names, and its synchronous calls leave event loops open.
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecationWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(path.read_text().splitlines()) < 80
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()
    gc.collect()  # what it left open is heard of here, and in no other test


@pytest.mark.parametrize("block", BLOCKS)
def test_code_in_the_docs_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[block], block, "exec"), {"__name__": "docs"})


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 100


def test_links_between_files_lead_somewhere() -> None:
    for page in [
        *PAGES,
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "benchmarks").rglob("*.md"),
        *ROOT.glob("integrations/*/*.md"),
    ]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), (page.name, target)


def test_integrations_touch_only_what_the_core_exports() -> None:
    """`from detox_guard import name`, and nothing behind it. `detox_guard.testing` is for their tests;
    `detox_guard.server` is public too."""
    for path in (ROOT / "integrations").rglob("*.py"):
        if "tests" in path.parts:
            continue
        text = path.read_text("utf-8")
        assert not re.search(r"^\s*(from|import) detox_guard\.(?!testing|server import)", text, re.MULTILINE), path
        for names in re.findall(r"^\s*from detox_guard import (\([^)]*\)|[^\n(]+)", text, re.MULTILINE):
            for name in re.findall(r"\w+", re.sub(r"#.*| as \w+", "", names)):
                assert name in detox_guard.__all__, (path, name)


def test_the_core_knows_no_framework() -> None:
    for path in (ROOT / "detox_guard").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) (langchain|llama_index)", path.read_text("utf-8"), re.MULTILINE), path


def test_no_file_is_over_400_lines() -> None:
    """A module knows one thing; what has grown to know two is split by subject."""
    folders = ("detox_guard", "integrations", "benchmarks", "tests", "examples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if ".venv" not in path.parts]
    long = {str(path.relative_to(ROOT)) for path in files if len(path.read_text("utf-8").splitlines()) > 400}
    assert not long


OF_LIBRARIES = {"_attn_implementation", "_exit", "_replace", "_name_or_path", "_llm", "_node_postprocessors"} | {
    "_hf_hook", "_is_mkldnn_bf16_supported",
}  # fmt: skip
"""Names of transformers, accelerate, torch, `os`, named tuples and LlamaIndex."""
HOOKS = {"_generate", "_stream", "_get_ls_params", "_identifying_params"}
"""What LangChain calls of a model."""


def test_tests_reach_into_no_private_attribute() -> None:
    """Of what they test; what their own classes keep (`self._…`) is theirs."""
    reaches = set()
    for folder in ("tests", "benchmarks/tests", *(str(one) for one in ROOT.glob("integrations/*/tests"))):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text("utf-8")
            own = set(re.findall(r"self\.(_\w+)", text))
            for node in ast.walk(ast.parse(text)):
                if not isinstance(node, ast.Attribute) or not re.match("_[a-z]", node.attr):
                    continue
                if node.attr not in OF_LIBRARIES | HOOKS | own:
                    reaches.add(f"{path.relative_to(ROOT)}:{node.lineno} {node.attr}")
    assert reaches == set()


def test_no_assertion_asks_a_clock() -> None:
    """Beside other work no time is short enough. `waiting.py` gives up in the end, and says so."""
    for path in [*(ROOT / "tests").rglob("*.py"), *ROOT.glob("*/tests/*.py"), *ROOT.glob("integrations/*/tests/*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Assert) and path.name != "waiting.py":
                assert not re.search(r"\b(perf_counter|monotonic|time\.time)\(", ast.unparse(node.test)), path
