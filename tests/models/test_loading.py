"""Every way people load models gives the same steered text as the model loaded plainly."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from tiny import make_tiny_backbone, make_tiny_config, make_tiny_model, make_tiny_tokenizer
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from detox_guard import BackboneError, DetoxiGen, InvalidParamsError, LoadOptions, UnsupportedBackboneError
from detox_guard.detoxifiers.soft_prompt import SteeringStream
from detox_guard.evaluation.bench import random_detoxifier
from detox_guard.models.backbone import Backbone, from_model
from detox_guard.models.load import load_backbone

if TYPE_CHECKING:
    from pathlib import Path

    from tiny import Kind

    from detox_guard.detoxifiers.soft_prompt import Detoxifier

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
CASES: dict[str, tuple[Kind, dict[str, Any], str]] = {
    "llama": ("llama", SHAPE, "model.layers"),
    "llama-tied": ("llama", {**SHAPE, "tie_word_embeddings": True}, "model.layers"),
    "mistral": ("mistral", {**SHAPE, "sliding_window": None}, "model.layers"),
    "gpt2": ("gpt2", {}, "transformer.h"),
}


def saved(folder: Path, case: str = "llama") -> Path:
    kind, config, _ = CASES[case]
    make_tiny_model(make_tiny_config(kind, **config)).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "tiny")


def detoxifier_for(case: str = "llama") -> Detoxifier:
    kind, config, _ = CASES[case]
    return random_detoxifier(make_tiny_backbone(kind, **config), virtual_tokens=4)


def said(backbone: Backbone, detoxifier: Detoxifier) -> list[str]:
    """A plain and a steered reply, and four steered ones decoded together."""
    with DetoxiGen(backbone, [SteeringStream(detoxifier)]) as model:
        asked = {"seed": 3, "max_new_tokens": 10, "ignore_eos": True, "calm_share": 1.0}
        alone = [model.generate("The quick", alpha=alpha, **asked).text for alpha in (0.0, 3.0)]
        together = model.batch(["The quick", "So,", "What a", "You"], model.params.replace(alpha=3.0, **asked))
    assert together[0].text == alone[1] != alone[0]
    return [*alone, *(one.text for one in together)]


def logits(backbone: Backbone) -> torch.Tensor:
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        out: torch.Tensor = backbone.model(ids).logits.float()
    return out


# --- spread over devices and disk


@pytest.mark.parametrize("case", CASES)
def test_layers_on_disk_say_what_layers_in_memory_say(case: str, tmp_path: Path) -> None:
    folder, detoxifier = saved(tmp_path / "tiny", case), detoxifier_for(case)
    plain = load_backbone(folder, dtype="float32")
    want, revision = said(plain, detoxifier), plain.revision
    ways: list[dict[str, Any]] = [
        {"device_map": "auto", "max_memory": {"cpu": "150KB"}, "offload_folder": tmp_path / "offload"},
        {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "all")},
    ]
    for way in ways:
        spread = load_backbone(folder, dtype="float32", **way)
        assert spread.spread
        assert any(parameter.is_meta for parameter in spread.model.parameters())
        assert (spread.device, spread.dtype) == (torch.device("cpu"), torch.float32)
        assert spread.revision == revision, "the same weights, wherever they lie"
        assert said(spread, detoxifier) == want


def test_a_map_of_one_device_is_that_device(folder: Path) -> None:
    want = said(load_backbone(folder, dtype="float32"), detoxifier_for())
    for device_map in ("cpu", {"": "cpu"}, "auto"):
        backbone = load_backbone(folder, dtype="float32", device_map=device_map)
        assert not backbone.spread
        assert said(backbone, detoxifier_for()) == want


def test_a_model_that_its_owner_spread_is_served(folder: Path, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )
    backbone = load_backbone(loaded, tokenizer=folder)
    assert backbone.spread
    assert said(backbone, detoxifier_for()) == said(load_backbone(folder, dtype="float32"), detoxifier_for())


def test_the_default_model_partly_on_disk(tmp_path: Path, default_backbone: Backbone) -> None:
    spread = load_backbone(
        dtype="float32", device_map="auto", max_memory={"cpu": "300MB"}, offload_folder=tmp_path / "offload"
    )
    assert spread.spread
    assert (spread.id, spread.revision) == (default_backbone.id, default_backbone.revision)
    torch.testing.assert_close(logits(spread), logits(default_backbone), atol=2e-4, rtol=1e-4)
    with DetoxiGen.from_pretrained(spread.model, tokenizer=spread.tokenizer, detoxifier=()) as model:
        assert "Paris" in model.generate("The capital of France is", temperature=0, max_new_tokens=2).text


def test_without_accelerate_it_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackboneError, match="device_map needs accelerate") as caught:
        load_backbone(folder, device_map="auto")
    assert caught.value.hint == "pip install accelerate"
    with pytest.raises(BackboneError, match="needs torchao") as caught:
        load_backbone(folder, quantization_config="int8")
    assert caught.value.hint == "pip install torchao"


# --- rounded weights


@pytest.fixture
def quantizers() -> None:
    """In the dev extra; one import of both is slow."""
    pytest.importorskip("torchao")
    pytest.importorskip("bitsandbytes")


@pytest.mark.usefixtures("quantizers")
@pytest.mark.parametrize(
    ("quantization", "kind", "most"),
    [("int8", "torchao-Int8", 0.1), ("fp8", "torchao-Float8", 0.5), ("nf4", "bitsandbytes-nf4", 1.0),
     ("bnb-int8", "bitsandbytes-8bit", 0.2)],
)  # fmt: skip
def test_rounded_weights_say_nearly_the_same(quantization: str, kind: str, most: float, tmp_path: Path) -> None:
    config = make_tiny_config("llama", **SHAPE, initializer_range=0.1)
    make_tiny_model(config).save_pretrained(tmp_path / "tiny")
    make_tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    plain = load_backbone(tmp_path / "tiny", dtype="float32")
    rounded = load_backbone(tmp_path / "tiny", dtype="float32", quantization_config=quantization)
    off = (logits(rounded).log_softmax(-1) - logits(plain).log_softmax(-1)).abs().max()
    assert 0 < off < most
    assert str(rounded.identity["quantization"]).startswith(kind)
    assert "quantization" not in plain.identity
    assert (rounded.id, rounded.hidden_size) == (plain.id, plain.hidden_size)
    assert rounded.revision != plain.revision
    detoxifier = random_detoxifier(plain, virtual_tokens=4)
    detoxifier.validate(rounded)  # trained on the plain weights
    rounded.model.save_pretrained(tmp_path / "rounded")
    rounded.tokenizer.save_pretrained(tmp_path / "rounded")
    want = said(rounded, detoxifier)
    again = load_backbone(tmp_path / "rounded", dtype="float32")  # rounded in its files
    assert again.quantization == rounded.quantization
    assert said(again, detoxifier) == want


@pytest.mark.usefixtures("quantizers")
def test_a_config_of_transformers_is_passed_through(folder: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    named = load_backbone(folder, dtype="float32", quantization_config="int8")
    given = load_backbone(folder, dtype="float32", quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))
    assert given.quantization == named.quantization
    assert given.revision == named.revision
    as_json = load_backbone(folder, dtype="float32", model_kwargs={"quantization_config": {"load_in_8bit": True}})
    as_object = load_backbone(folder, dtype="float32", quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    assert as_json.quantization == as_object.quantization
    assert as_json.quantization != named.quantization


@pytest.mark.parametrize(
    ("config", "package"),
    [({"quant_method": "quanto", "weights": "int8"}, "optimum-quanto"), ({"quant_method": "gptq", "bits": 4}, "gptq"),
     ({"quant_method": "hqq", "nbits": 4, "group_size": 64}, "hqq")],
)  # fmt: skip
def test_what_is_missing_for_a_quantization_is_named(folder: Path, config: dict[str, Any], package: str) -> None:
    with pytest.raises(BackboneError) as caught:
        load_backbone(folder, quantization_config=config)
    assert package in f"{caught.value} {caught.value.hint}".lower()
    assert "install" in f"{caught.value} {caught.value.hint}"
    assert "\n" not in str(caught.value)


def test_an_awq_model_in_its_files_names_its_package(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError) as caught:
        load_backbone(folder)
    assert "pip install" in caught.value.hint


# --- adapters


def tuned(folder: Path, **config: Any) -> Any:
    """A LoRA that changes what the model says; equal each time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        made = peft.get_peft_model(
            model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj", "up_proj"], **config)
        )
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.2)
    return made.eval()


def test_a_lora_folder_says_what_the_merged_model_says(folder: Path, tmp_path: Path) -> None:
    tuned(folder).save_pretrained(tmp_path / "my-lora")
    tuned(folder).merge_and_unload().save_pretrained(tmp_path / "merged")
    make_tiny_tokenizer().save_pretrained(tmp_path / "merged")
    want = said(load_backbone(tmp_path / "merged", dtype="float32"), detoxifier_for())
    assert want != said(load_backbone(folder, dtype="float32"), detoxifier_for())
    backbone = load_backbone(tmp_path / "my-lora", dtype="float32")
    assert (backbone.id, backbone.base_id, backbone.adapter) == ("my-lora", "tiny", "LORA")
    assert backbone.identity["adapter"] == "LORA"
    assert said(backbone, detoxifier_for()) == want
    loaded = load_backbone(tuned(folder), tokenizer=folder)
    assert loaded.adapter == "LORA"
    assert said(loaded, detoxifier_for()) == want, "beside the weights, it acts on both rows"


def test_a_detoxifier_of_the_base_serves_the_adapter(folder: Path, tmp_path: Path) -> None:
    tuned(folder).save_pretrained(tmp_path / "my-lora")
    detoxifier = random_detoxifier(load_backbone(folder, dtype="float32"), virtual_tokens=4)
    detoxifier.save(tmp_path / "detoxifier")
    with DetoxiGen.from_pretrained(tmp_path / "my-lora", detoxifier=tmp_path / "detoxifier") as model:
        assert model.generate("So,", alpha=2.0, max_new_tokens=2, ignore_eos=True).usage.completion_tokens == 2


@pytest.mark.usefixtures("quantizers")
def test_an_adapter_stays_beside_rounded_weights(folder: Path, tmp_path: Path) -> None:
    tuned(folder).save_pretrained(tmp_path / "my-lora")
    rounded = load_backbone(tmp_path / "my-lora", dtype="float32", quantization_config="int8")
    assert (rounded.adapter, rounded.quantization is not None) == ("LORA", True)
    whole = load_backbone(tmp_path / "my-lora", dtype="float32")
    off = (logits(rounded).softmax(-1) - logits(whole).softmax(-1)).abs().max()
    base = (logits(load_backbone(folder, dtype="float32")).softmax(-1) - logits(whole).softmax(-1)).abs().max()
    assert off < 0.3 < base
    assert said(rounded, detoxifier_for())


def test_dora_beside_and_merged_are_one_model(folder: Path, tmp_path: Path) -> None:
    tuned(folder, use_dora=True).save_pretrained(tmp_path / "dora")
    merged = load_backbone(tmp_path / "dora", dtype="float32")
    beside = load_backbone(tuned(folder, use_dora=True), tokenizer=folder)
    torch.testing.assert_close(logits(merged), logits(beside), atol=1e-3, rtol=1e-3)


def test_an_adapter_with_a_tokenizer_and_tokens_of_its_own(folder: Path, tmp_path: Path) -> None:
    tuned(folder).save_pretrained(tmp_path / "my-lora")
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "my-lora")
    backbone = load_backbone(tmp_path / "my-lora", dtype="float32")
    assert (len(backbone.tokenizer), backbone.vocab_size) == (481, 481)


def test_adapters_that_cannot_be_served(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "adapter"
    tuned(folder).save_pretrained(place)
    with pytest.raises(BackboneError, match="offloaded") as caught:
        load_backbone(place, device_map={"": "disk"}, offload_folder=tmp_path / "offload")
    assert "merge_and_unload" in caught.value.hint
    told = json.loads((place / "adapter_config.json").read_text())

    def refused(changes: dict[str, Any]) -> BackboneError:
        (place / "adapter_config.json").write_text(json.dumps({**told, **changes}))
        with pytest.raises(BackboneError) as caught:
            load_backbone(place)
        return caught.value

    assert "no such file or folder" in str(refused({"base_model_name_or_path": "./gone"}))
    assert "base_model_name_or_path" in refused({"base_model_name_or_path": None}).hint
    assert isinstance(refused({"task_type": "SEQ_CLS"}), UnsupportedBackboneError)
    assert "PREFIX_TUNING" in str(refused({"peft_type": "PREFIX_TUNING"}))
    assert refused({"peft_type": "PROMPT_TUNING"}).hint == "It holds a soft prompt: pass it as the detoxifier."
    assert "activated LoRA" in str(refused({"alora_invocation_tokens": [5]}))
    (place / "adapter_model.safetensors").unlink()
    assert "safetensors" in refused({}).hint


def test_a_loaded_soft_prompt_is_no_model(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    soft = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UnsupportedBackboneError, match="PROMPT_TUNING") as caught:
        from_model(soft, make_tiny_tokenizer())
    assert "detoxifier" in caught.value.hint


# --- names, dtypes, the hub's cache, other keywords


def cached(repo: str, source: Path, cache: Path, commit: str, revision: str = "main") -> None:
    """`source` as the hub's cache keeps a repository."""
    place = cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(source, place / "snapshots" / commit)
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(commit)


def test_hub_models_and_adapters_out_of_a_cache(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    commits = {name: letter * 40 for name, letter in (("base", "a"), ("new", "b"), ("lora", "c"))}
    cached("org/tiny", folder, cache, commits["base"])
    make_tiny_model(make_tiny_config("llama", **SHAPE), seed=1).save_pretrained(folder)
    cached("org/tiny", folder, cache, commits["new"], "v2")
    where = {"cache_dir": cache, "local_files_only": True, "dtype": "float32"}
    first = load_backbone("org/tiny", **where)
    second = load_backbone("org/tiny", revision="v2", **where)
    assert (first.id, first.revision, second.revision) == ("org/tiny", commits["base"], commits["new"])
    assert not torch.equal(logits(first), logits(second))
    made = tuned(folder)
    made.peft_config["default"].base_model_name_or_path = "org/tiny"
    made.peft_config["default"].revision = "v2"
    made.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    cached("org/lora", tmp_path / "adapter", cache, commits["lora"])
    adapted = load_backbone("org/lora", **where)
    assert (adapted.id, adapted.base_id, adapted.revision) == ("org/lora", "org/tiny", commits["lora"])
    torch.testing.assert_close(logits(adapted), logits(from_model(made.merge_and_unload(), make_tiny_tokenizer())))


def test_dtype_auto_is_the_one_that_was_saved(tmp_path: Path) -> None:
    make_tiny_model(make_tiny_config("llama")).to(torch.float16).save_pretrained(tmp_path)
    make_tiny_tokenizer().save_pretrained(tmp_path)
    assert load_backbone(tmp_path, dtype="auto").dtype == torch.float16
    assert load_backbone(tmp_path, torch_dtype="auto").dtype == torch.float16
    assert load_backbone(tmp_path, model_kwargs={"torch_dtype": torch.float64}).dtype == torch.float64
    assert load_backbone(tmp_path, torch_dtype="float32").dtype == torch.float32


def test_attention_and_other_keywords_reach_transformers(folder: Path) -> None:
    eager = load_backbone(folder, dtype="float32", attn_implementation="eager")
    assert eager.model.config._attn_implementation == "eager"
    assert said(eager, detoxifier_for()) == said(load_backbone(folder, dtype="float32"), detoxifier_for())
    short = load_backbone(folder, dtype="float32", model_kwargs={"max_position_embeddings": 64})
    assert short.max_positions == 64


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"device": "cpu", "device_map": "auto"}, "device"),
        ({"device_map": "everywhere"}, "device"),
        ({"device_map": 1.5}, "device_map"),
        ({"max_memory": {"cpu": "1GB"}}, "max_memory"),
        ({"offload_folder": "x", "device_map": "cpu"}, "offload_folder"),
        ({"quantization_config": "int3"}, "quantization_config"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation"),
        ({"dtype": "float32", "torch_dtype": "auto"}, "torch_dtype"),
        ({"dtype": "half"}, "dtype"),
        ({"revision": "a", "model_kwargs": {"revision": "b"}}, "model_kwargs.revision"),
        ({"model_kwargs": {"use_safetensors": False}}, "model_kwargs.use_safetensors"),
        ({"model_kwargs": {"load_in_8bit": True}}, "model_kwargs.load_in_8bit"),
        ({"model_kwargs": {"zork": 1}}, "model_kwargs.zork"),
        ({"model_kwargs": "x"}, "model_kwargs"),
        ({"devise": "cpu"}, "devise"),
        ({"token": 5}, "token"),
    ],
)
def test_bad_options_name_their_field(folder: Path, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidParamsError) as caught:
        load_backbone(folder, **options)
    assert caught.value.field.startswith(field)


@pytest.mark.parametrize("option", [{"device_map": "auto"}, {"quantization_config": "int8"}, {"gguf_file": "x.gguf"}])
def test_a_loaded_model_takes_no_way_of_loading(option: dict[str, Any]) -> None:
    with pytest.raises(InvalidParamsError, match="loaded already"):
        load_backbone(make_tiny_model(make_tiny_config("llama")), tokenizer=make_tiny_tokenizer(), **option)


def test_a_token_is_not_shown() -> None:
    assert "hf_secret" not in repr(LoadOptions(token="hf_secret"))
