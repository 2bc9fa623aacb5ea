"""The commands and their options, exit codes, and those that train, inform and measure; on tiny models in folders."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from commands import DEVICE, PROMPT, rows, run
from tiny import make_tiny_config, make_tiny_model

from detox_guard.cli import EXIT_CODES
from detox_guard.cli.options import NEEDS_TORCH
from detox_guard.cli.prompts import as_chat, read_prompts
from detox_guard.detoxifiers import registry
from detox_guard.detoxifiers.card import DetoxifierCard
from detox_guard.detoxifiers.soft_prompt import Detoxifier
from detox_guard.errors import DataError, DetoxGuardError
from detox_guard.evaluation.config import BenchConfig, EvalConfig
from detox_guard.models.load import load_backbone
from detox_guard.models.options import LoadOptions
from detox_guard.settings import DecodingParams
from detox_guard.training.config import AdaptConfig, TrainingConfig

if TYPE_CHECKING:
    from pathlib import Path


def test_help_imports_no_torch_and_lists_the_exit_codes() -> None:
    code = (
        "import sys, contextlib\nfrom detox_guard.cli import app\n"
        "with contextlib.suppress(SystemExit): app(sys.argv[1:])\n"
        "bad = {'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    for words in (["--help"], ["generate", "--help"], ["train", "--help"], ["generate", "x", "--alpha", "-1"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if "--help" in words:
            flat = re.sub(r"\s+", " ", done.stdout)
            assert re.sub(r"\s+", " ", EXIT_CODES) in flat


@pytest.mark.parametrize(
    "command", ["generate", "chat", "adapt", "detoxifiers", "train", "bench", "eval", "report", "info", "demo"]
)
def test_every_command_has_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Exit codes" in result.stdout


@pytest.mark.parametrize(
    ("command", "source", "left"),
    [
        ("generate", DecodingParams, {"trace", "trace_top", "guard", "grammar"}),
        ("generate", LoadOptions, {"token"}),
        ("eval", EvalConfig, {"token"}),
        ("bench", BenchConfig, {"token"}),
        ("train", TrainingConfig, {"token", *NEEDS_TORCH}),
        ("adapt", AdaptConfig, {"model", "token", *NEEDS_TORCH}),
    ],
)
def test_every_field_has_an_option_that_says_what_the_field_says(
    command: str, source: Any, left: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    said = re.sub(r"[\s│]+", "", run(command, "--help").stdout)
    for name, field in source.model_fields.items():
        assert field.description, name
        if name not in left:
            flag = "--quantize" if name == "quantization_config" else "--" + name.replace("_", "-")
            assert flag.removesuffix("s") in said, name
            assert re.sub(r"\s+", "", field.description.split(".")[0]).split("(`")[0] in said, name


def test_version() -> None:
    assert run("--version").stdout.startswith("detox-guard ")


# -- errors and exit codes


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["generate", "x", "--alpha", "-1"], 2),
        (["generate", "x", "--alpha", "much"], 2),
        (["generate", "x", "--rule", "none"], 2),
        (["generate", "x", "--with-trace"], 2),
        (["generate", "--file", "absent.txt"], 2),
        (["generate"], 2),
        (["generate", "x", "--trace", "/dev/null/out.html"], 2),
        (["generate", "x", "--model", "./absent"], 3),
        (["generate", "x", "--scorer", "./absent"], 3),
        (["generate", "x", "--device", "abacus", "--model", "./absent"], 2),
        (["train", "--data", "absent.txt", "--output", "out"], 2),
        (["train", "--output", "out"], 2),
        (["no-such-command"], 2),
    ],
)
def test_exit_codes(words: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words)
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr
    assert "Traceback" not in result.stderr


def test_a_lone_bad_prompt_has_its_own_exit_code(loaded: tuple[str, ...]) -> None:
    for words in ([""], ["", "--json"], ["long " * 5000]):
        result = run("generate", *words, *loaded)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")


def test_debug_lets_the_error_through() -> None:
    with pytest.raises(DetoxGuardError):
        run("--debug", "generate", "x", "--alpha", "-1")


def test_a_wrong_detoxifier_is_one_line(model: Path, tmp_path: Path) -> None:
    card = DetoxifierCard(base_id="other", hidden_size=48, virtual_tokens=1)
    Detoxifier(torch.zeros(1, 48), card).save(tmp_path)
    result = run("generate", "x", "--model", model, "--detoxifier", tmp_path, *DEVICE)
    assert result.exit_code == 3
    assert "trained for 'other'" in result.stderr


# -- train, info, demo


def test_train_makes_a_detoxifier_that_generate_can_use(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "toxic.txt"
    data.write_text("\n".join(f"what a silly idea number {i} that is" for i in range(12)))
    words = ("--data", data, "--model", model, "--output", tmp_path / "made", "--steps", "2", "--batch-size", "2")
    more = ("--heldout", "4", "--virtual-tokens", "3", "--reply-tokens", "8", "--passage-tokens", "10", "20", *DEVICE)
    result = run("train", *words, *more, "--mixture", "1", "0", "0", "0")
    assert result.exit_code == 0, result.stderr
    for expected in ("before", "after", "mean", "Saved in"):
        assert expected in result.stdout
    made = run(
        "generate", PROMPT, "--model", model, "--detoxifier", tmp_path / "made", "--max-new-tokens", "3", *DEVICE
    )
    assert made.exit_code == 0


def test_info(loaded: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (facts,) = rows(run("info", "--json", *loaded))
    assert facts["backbone"]["id"] == "tiny-chat"
    tiny = make_tiny_model(make_tiny_config("llama", max_position_embeddings=4096, num_hidden_layers=1))
    assert facts["backbone"]["parameters"] == tiny.num_parameters()
    assert facts["detoxifiers"][0]["virtual_tokens"] == 4
    assert facts["versions"]["torch"]
    assert facts["scorer"]["name"]
    assert facts["device"] == "cpu"
    text = run("info", *loaded)
    assert text.exit_code == 0
    assert "tiny-chat" in text.stdout
    # without a model named, nothing is downloaded to describe it
    monkeypatch.setenv("DETOX_GUARD_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (facts,) = rows(run("info", "--json", *DEVICE))
    assert "--fetch" in facts["backbone"]["state"]


def test_ones_own_model_needs_no_detoxifier(
    model: Path, detoxifier: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DETOX_GUARD_CACHE", str(tmp_path))
    short = ("--max-new-tokens", "3", "--seed", "1")
    (said,) = rows(run("generate", PROMPT, "--model", model, "--json", *short, *DEVICE))
    assert said["detoxifiers"]
    assert all(":text:" in one for one in said["detoxifiers"])
    again = run("generate", PROMPT, "--model", model, "--detoxifier", "auto", "--json", *short, *DEVICE)
    assert rows(again) == [said]
    (facts,) = rows(run("info", "--json", "--model", model, *DEVICE))
    assert all("untrained" in one["serves"] and one["text"] for one in facts["detoxifiers"])
    registry.register(detoxifier, load_backbone(model, device="cpu", dtype="float32"))
    (facts,) = rows(run("info", "--json", "--model", model, *DEVICE))
    (one,) = facts["detoxifiers"]
    assert "trained here" in one["serves"]
    assert one["sha256"] == Detoxifier.load(detoxifier).sha256
    (said,) = rows(run("generate", PROMPT, "--model", model, "--json", *short, *DEVICE))
    assert said["detoxifiers"] == [f"-1:{one['sha256'][:12]}"]


def test_info_shows_the_rest_when_a_detoxifier_does_not_fit(model: Path, tmp_path: Path) -> None:
    result = run("info", "--json", "--model", model, "--detoxifier", tmp_path / "absent", *DEVICE)
    (facts,) = rows(result)
    assert result.exit_code == 3
    assert "error" in facts["detoxifiers"][0]
    assert facts["backbone"]["num_layers"] == 1


def test_demo_is_the_same_twice_and_writes_its_page(loaded: tuple[str, ...], tmp_path: Path) -> None:
    page = tmp_path / "out" / "demo.html"
    outputs = []
    for _ in range(2):
        result = run("demo", "--output", page, "--max-new-tokens", "4", *loaded)
        assert result.exit_code == 0, result.stderr
        outputs.append(re.sub(r"in \d+ s", "", result.stdout))
    assert outputs[0] == outputs[1]
    assert page.name in outputs[0].replace("\n", "")
    assert page.read_text(encoding="utf-8").count("<section>") == 24  # plain, steered, guarded


@pytest.mark.parametrize(
    ("command", "module"),
    [("bench", "bench.run_bench"), ("eval", "run.run_eval")],
)
def test_measuring_commands_hand_on_every_option(
    command: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each field of the settings can be given."""
    import importlib

    place, name = f"detox_guard.evaluation.{module}".rsplit(".", 1)
    source: Any = EvalConfig if command == "eval" else BenchConfig
    wanted = set(source.model_fields) - {"token"}
    importlib.import_module(place)
    asked: dict[str, Any] = {}

    class Report:
        def to_json(self) -> str:
            return '{"fine": true}'

        def table(self) -> str:
            return "a table"

    def measured(**given: Any) -> Report:
        asked.update(given)
        return Report()

    monkeypatch.setattr(f"{place}.{name}", measured)
    flags = {"judges": "--judge", "alphas": "--alpha", "methods": "--method", "lm_judges": "--lm-judge"}
    flags |= {"quantization_config": "--quantize"}
    values = {"prompts": tmp_path, "output": tmp_path, "model": "m", "detoxifier": "d", "device": "cpu"}
    values |= {"dtype": "float32", "judges": "embedded", "methods": "plain", "attn_implementation": "sdpa"}
    values |= {"engine": "torch"}
    words = []
    for keyword in wanted:
        flag = flags.get(keyword, "--" + keyword.replace("_", "-"))
        switch = source.model_fields[keyword].annotation in (bool, bool | None)
        words += [flag] if switch else [flag, str(values.get(keyword, 2))]
    assert rows(run(command, *words, "--json")) == [{"fine": True}]
    assert set(asked) - {"table"} == wanted
    assert "a table" in run(command, *words).stdout


def test_system_does_not_replace_one_that_is_there() -> None:
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "hi"}]
    assert as_chat(own, "yours") == own
    assert as_chat("hi", None) == [{"role": "user", "content": "hi"}]


def test_prompt_files_keep_odd_characters_and_refuse_bad_bytes(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes("a\u2028b\fc\r\n{not json\n".encode())
    assert read_prompts([], file) == ["a\u2028b\fc", "{not json"]
    file.write_bytes(b"fine\n\xff\xfe")
    fine, bad = read_prompts([], file)
    assert fine == "fine"
    assert isinstance(bad, DataError)
    assert "line 2: not valid UTF-8" in str(bad)
    file.write_bytes(b"\n \n")
    with pytest.raises(DataError, match="no prompts"):
        read_prompts([], file)
