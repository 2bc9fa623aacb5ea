"""What the distribution exports and how it is laid out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import llama_index.llms.detox_guard as package

ROOT = Path(package.__file__).parents[3]


def test_every_exported_name_is_there() -> None:
    assert len(set(package.__all__)) == len(package.__all__) == 11
    assert all(hasattr(package, name) for name in package.__all__)


def test_the_namespace_stays_open() -> None:
    assert not (ROOT / "llama_index" / "__init__.py").exists()
    assert not (ROOT / "llama_index" / "llms" / "__init__.py").exists()


def test_importing_and_constructing_load_no_torch() -> None:
    code = (
        "import sys, llama_index.llms.detox_guard as d; d.DetoxiGenLLM(alpha=3.0).to_payload(); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    path = [str(ROOT), *(entry for entry in sys.path if entry)]
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {code}"], check=True, timeout=120)
