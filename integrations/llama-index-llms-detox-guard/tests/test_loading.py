"""How the model is loaded, as keywords: they reach the core, are checked at once, and a token is never written down."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from integrating import BAD_LOADING, record_loading
from llama_index.llms.detox_guard import DetoxiGenLLM
from transformers import BitsAndBytesConfig

from detox_guard import InvalidParamsError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    return record_loading(monkeypatch)


def test_every_way_of_loading_reaches_the_core(asked: list[dict[str, Any]]) -> None:
    how = {
        "device_map": "auto", "max_memory": {0: "20GiB", "cpu": "60GiB"}, "attn_implementation": "eager",
        "trust_remote_code": True, "local_files_only": True, "revision": "v2", "model_kwargs": {"variant": "fp16"},
    }  # fmt: skip
    llm = DetoxiGenLLM("org/model", token="hf_secret", alpha=1.0, **how)
    llm.complete("Hi")
    assert asked == [{"model": "org/model", "token": "hf_secret", **how}]
    llm.model_copy(update={"device_map": "sequential"}).complete("Hi")
    assert asked[1] == {"model": "org/model", "token": "hf_secret", **how, "device_map": "sequential"}
    pickle.loads(pickle.dumps(llm)).complete("Hi")
    assert asked[2] == asked[0]


def test_a_quantization_config_is_kept_as_plain_data(asked: list[dict[str, Any]]) -> None:
    llm = DetoxiGenLLM("org/model", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    DetoxiGenLLM.from_dict(json.loads(json.dumps(llm.to_dict()))).complete("Hi")
    assert asked[0]["quantization_config"]["load_in_8bit"] is True


def test_a_token_is_shown_nowhere() -> None:
    llm = DetoxiGenLLM("org/model", token="hf_secret")
    assert "hf_secret" not in f"{llm!r} {llm.to_json()} {llm.to_payload()}"


@pytest.mark.parametrize(("bad", "field"), BAD_LOADING)
def test_bad_ways_are_named_at_once(bad: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        DetoxiGenLLM(**bad)
    assert caught.value.field == field
