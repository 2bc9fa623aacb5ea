"""Ways of loading a model, as options of the commands."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from commands import PROMPT, run

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_ways_of_loading_are_options(
    model: Path, loaded: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("generate", PROMPT, "--seed", "1", "--max-new-tokens", "6", "--json")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    plain = run(*asked, *loaded)
    on_disk = (*loaded[:4], "--dtype", "float32", "--device-map", '{"": "disk"}', "--offload-folder", tmp_path)
    spread = run(*asked, *on_disk, "--local-files-only", "--attn-implementation", "sdpa")
    assert json.loads(spread.stdout)["text"] == json.loads(plain.stdout)["text"]
    for words in (("--device-map", "{"), ("--quantize", "int3"), ("--model-kwargs", '{"zork": 1}')):
        result = run(*asked, *loaded[:4], *words)
        assert result.exit_code == 2
        assert words[0].strip("-").replace("-", "_").replace("quantize", "quantization_config") in result.stderr
    assert "--token" not in run("generate", "--help").stdout.replace("--max-new-tokens", "").replace("--stop-token", "")
