"""How the model is loaded, as fields: they reach the core, are checked at once, and a token is never written down."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from detox_guard import InvalidParamsError
from integrating import BAD_LOADING, record_loading
from langchain_core.load import dumps
from transformers import BitsAndBytesConfig

from langchain_detox_guard import ChatDetoxiGen, DetoxiGenLLM


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    return record_loading(monkeypatch)


def test_every_way_of_loading_reaches_the_core(asked: list[dict[str, Any]]) -> None:
    how = {
        "device_map": "auto", "max_memory": {0: "20GiB", "cpu": "60GiB"}, "offload_folder": "offload",
        "attn_implementation": "eager", "trust_remote_code": True, "cache_dir": "cache", "local_files_only": True,
        "revision": "v2", "model_kwargs": {"variant": "fp16"},
    }  # fmt: skip
    DetoxiGenLLM(model="org/model", token="hf_secret", **how).invoke("Hi")
    assert asked == [{"model": "org/model", "token": "hf_secret", **how}]
    DetoxiGenLLM(model="org/model").invoke("Hi", quantization_config="int8")
    assert asked[1] == {"model": "org/model", "quantization_config": "int8"}


def test_a_quantization_config_is_kept_as_plain_data(asked: list[dict[str, Any]]) -> None:
    llm = ChatDetoxiGen(model="org/model", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    for one in (llm, pickle.loads(pickle.dumps(llm)), llm.model_copy(deep=True)):
        assert one.quantization_config["load_in_8bit"] is True
        assert one.quantization_config["quant_method"] == "bitsandbytes"
    assert "load_in_8bit" in dumps(llm)
    assert llm._identifying_params != ChatDetoxiGen(model="org/model")._identifying_params


def test_a_token_is_shown_nowhere() -> None:
    llm = DetoxiGenLLM(model="org/model", token="hf_secret")
    assert "hf_secret" not in f"{llm!r} {dumps(llm)} {llm._identifying_params}"
    assert "HF_TOKEN" in dumps(llm)


@pytest.mark.parametrize(("bad", "field"), BAD_LOADING)
def test_bad_ways_are_named_at_once(bad: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        DetoxiGenLLM(**bad)
    assert caught.value.field == field
