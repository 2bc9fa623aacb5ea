"""The command line end to end: real commands on tiny backbones saved to a folder, in process and as subprocesses."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from io import StringIO
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console
from tiny import make_tiny_config, make_tiny_model, make_tiny_tokenizer
from typer.testing import CliRunner, Result

from detox_guard._adaptive import adaptive_alpha
from detox_guard.cli import EXIT_CODES, app
from detox_guard.cli.compare import BETTER, Pair, summary
from detox_guard.cli.console import print_json, tinted, visible
from detox_guard.cli.prompts import as_chat, read_prompts
from detox_guard.cli.session import Exchange
from detox_guard.detoxifiers.soft_prompt import Detoxifier, DetoxifierCard
from detox_guard.errors import DataError, DetoxGuardError
from detox_guard.results import TokenTrace, Trace
from detox_guard.settings import DecodingParams
from detox_guard.training.config import AdaptConfig, TrainingConfig

if TYPE_CHECKING:
    from pathlib import Path

PROMPT = "The quick brown fox"
DEVICE = ("--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a chat template, in a folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-chat"
    config = make_tiny_config("llama", max_position_embeddings=4096, num_hidden_layers=1)
    make_tiny_model(config).save_pretrained(folder)
    make_tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def detoxifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random soft prompt for that model."""
    folder = tmp_path_factory.mktemp("detoxifiers") / "random"
    card = DetoxifierCard(base_id="tiny-chat", hidden_size=48, virtual_tokens=4, position="reply")
    Detoxifier(torch.randn(4, 48, generator=torch.Generator().manual_seed(0)), card).save(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(model: Path, detoxifier: Path) -> tuple[str, ...]:
    return ("--model", str(model), "--detoxifier", str(detoxifier), *DEVICE)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain text from rich and typer, and no page as wide as this terminal."""
    for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS", "DETOX_GUARD_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    # set here first, so that what the command sets by default is taken back after the test
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def run(*words: str | Path, stdin: str | bytes | None = None) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def rows(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def start(*words: str | Path, **kwargs: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from detox_guard.cli import main; main()", *map(str, words)]
    settings = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        # A shell starts what runs in the background deaf to Ctrl-C, and the children inherit that.
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    }
    return subprocess.Popen(command, **{**settings, "text": True, "encoding": "utf-8", **kwargs})


# -- help, options


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


@pytest.mark.parametrize("command", ["generate", "chat", "adapt", "detoxifiers", "train", "bench", "eval", "report", "info", "demo"])
def test_every_command_has_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Exit codes" in result.stdout


@pytest.mark.parametrize(
    ("command", "source", "left"),
    [("generate", DecodingParams, {"trace", "guard", "grammar"}), ("train", TrainingConfig, set()), ("adapt", AdaptConfig, {"model"})],
)
def test_every_field_has_an_option_that_says_what_the_field_says(
    command: str, source: Any, left: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    said = re.sub(r"[\s│]+", "", run(command, "--help").stdout)
    for name, field in source.model_fields.items():
        assert field.description, name
        if name not in left:
            assert "--" + name.replace("_", "-").removesuffix("s") in said, name
            assert re.sub(r"\s+", "", field.description.split(".")[0]).split("(`")[0] in said, name


def test_version() -> None:
    assert run("--version").stdout.startswith("detox-guard ")


# -- generate


def test_one_prompt_gives_the_same_text_streamed_as_json_and_in_a_batch(loaded: tuple[str, ...]) -> None:
    decoding = ("--seed", "7", "--max-new-tokens", "12", "--alpha", "1.5", "--rule", "detoxigen")
    plain = run("generate", PROMPT, *decoding, *loaded)
    (record,) = rows(run("generate", PROMPT, "--json", *decoding, *loaded))
    batch = rows(run("generate", "other", PROMPT, "--json", *decoding, *loaded))
    assert plain.stdout == record["text"] + "\n"
    assert batch[1] == record
    assert record["prompt"] == PROMPT
    assert record["seed"] == 7
    assert record["alpha"] == adaptive_alpha([PROMPT], DecodingParams(alpha=1.5)) < 1.5
    assert record["usage"]["completion_tokens"] == 12
    assert record["finish_reason"] == "length"


def test_json_holds_score_plain_and_trace(loaded: tuple[str, ...]) -> None:
    result = run(
        "generate",
        PROMPT,
        "again",
        "--compare",
        "--json",
        "--with-trace",
        "--seed",
        "1",
        "--max-new-tokens",
        "6",
        *loaded,
    )
    assert result.exit_code == 0
    for record in rows(result):
        assert 0 <= record["score"] <= 1
        assert record["plain"]["seed"] == record["seed"] == 1
        assert record["plain"]["alpha"] == 0
        tokens = record["trace"]["tokens"]
        assert "".join(token["text"] for token in tokens) == record["text"]
        assert all(token["kl_steering"] == 0 for token in record["plain"]["trace"]["tokens"])


def test_compare_shows_both_sides(loaded: tuple[str, ...]) -> None:
    result = run("generate", PROMPT, "--compare", "--seed", "1", "--max-new-tokens", "6", *loaded)
    assert result.exit_code == 0
    used = f"guarded · α {adaptive_alpha([PROMPT], DecodingParams()):.3g}"
    for words in (PROMPT, "plain", used, "toxicity", "Mean toxicity"):
        assert words in result.stdout


def test_a_bad_prompt_fails_alone(loaded: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    lines = ['{"prompt": "one"}', "{nonsense", '{"prompt": ""}', '{"messages": [{"role": "user", "content": "hi"}]}']
    file.write_text("\n".join([*lines, json.dumps({"prompt": "long " * 5000})]))
    result = run("generate", "--file", file, "--json", "--max-new-tokens", "4", *loaded)
    records = rows(result)
    assert result.exit_code == 1
    assert ["error" in record for record in records] == [False, True, True, False, True]
    assert records[3]["messages"][0]["content"] == "hi"
    assert [record["error"]["type"] for record in records if "error" in record] == [
        "DataError",
        "PromptError",
        "PromptTooLongError",
    ]
    assert len(re.findall(r"^error: prompt \d: ", result.stderr, re.M)) == 3
    assert "line 2" in result.stderr
    assert "Traceback" not in result.stderr
    text = run("generate", "--file", file, "--max-new-tokens", "4", "--seed", "1", *loaded)
    assert text.exit_code == 1
    assert text.stdout.strip()


def test_prompts_from_a_pipe_and_a_file(loaded: tuple[str, ...], tmp_path: Path) -> None:
    short = ("--json", "--max-new-tokens", "2", "--alpha", "0")
    assert [r["prompt"] for r in rows(run("generate", *short, *loaded, stdin="one\n\ntwo\r\n"))] == ["one", "two"]
    assert [r["prompt"] for r in rows(run("generate", "-", "b", *short, *loaded, stdin="a"))] == ["a", "b"]
    file = tmp_path / "p.txt"
    file.write_text("uno\ndos\n", encoding="utf-8-sig")
    assert [r["prompt"] for r in rows(run("generate", "-f", file, *short, *loaded))] == ["uno", "dos"]
    result = run("generate", *short, *loaded, stdin='{"prompt": "json"}\n')
    assert rows(result)[0]["prompt"] == "json"


def test_system_makes_a_chat(loaded: tuple[str, ...]) -> None:
    (record,) = rows(run("generate", "hi", "--system", "be kind", "--json", "--max-new-tokens", "2", *loaded))
    assert [m["role"] for m in record["messages"]] == ["system", "user"]


def test_variables_of_the_template_are_given_as_json(tmp_path: Path) -> None:
    folder = tmp_path / "thinks"
    make_tiny_model(make_tiny_config("llama", num_hidden_layers=1)).save_pretrained(folder)
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    tokenizer.save_pretrained(folder)
    plain = ("generate", "--chat", "Hi", "--alpha", "0", "--max-new-tokens", "1", "--json", "--model", folder, *DEVICE)
    used = []
    for words in ((), ("--template-kwarg", "enable_thinking=true"), ("--template-kwarg", "enable_thinking=false")):
        result = run(*plain, *words)
        assert result.exit_code == 0
        record = json.loads(result.stdout)
        assert record["messages"] == [{"role": "user", "content": "Hi"}]
        used.append(record["usage"]["prompt_tokens"])
    assert used[0] == used[1] < used[2]
    for words in (("Hi",), ("--chat", "Hi")):  # a plain prompt goes through no template
        wrong = run(
            "generate", *words, "--template-kwarg", "thinking" if "--chat" in words else "a=1", "--model", folder
        )
        assert wrong.exit_code != 0


def test_plain_decoding_needs_no_detoxifier(model: Path) -> None:
    words = ("generate", PROMPT, "--model", model, *DEVICE, "--max-new-tokens", "4")
    assert run(*words, "--alpha", "0").exit_code == 0
    guarded = run(*words)
    assert guarded.exit_code == 3
    assert re.fullmatch(r"error: .*\nhint: .*\n", guarded.stderr)
    assert guarded.stdout == ""


def test_trace_page_holds_every_prompt(loaded: tuple[str, ...], tmp_path: Path) -> None:
    page = tmp_path / "new" / "out.html"
    result = run("generate", "first <b>", "second", "--trace", page, "--max-new-tokens", "4", *loaded)
    assert result.exit_code == 0
    html = page.read_text(encoding="utf-8")
    assert html.count("<section>") == 2
    assert "first &lt;b&gt;" in html
    assert [file.name for file in page.parent.iterdir()] == ["out.html"]


def test_stop_strings_are_repeatable(loaded: tuple[str, ...]) -> None:
    base = ("generate", PROMPT, "--seed", "3", "--max-new-tokens", "20", *loaded)
    text = rows(run(*base, "--json"))[0]["text"]
    stop = text[4:6]
    (record,) = rows(run(*base, "--json", "--stop", "\0never", "--stop", stop))
    assert record["text"] == text[: text.index(stop)]
    assert record["finish_reason"] == "stop"


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


# -- chat


def test_chat_keeps_the_history_and_obeys_commands(loaded: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[str], float]] = []
    from detox_guard.detoxigen import DetoxiGen

    stream = DetoxiGen.stream

    def watched(self: DetoxiGen, prompt: Any, params: Any) -> Any:
        seen.append(([message["role"] for message in prompt], params.alpha))
        return stream(self, prompt, params)

    monkeypatch.setattr(DetoxiGen, "stream", watched)
    said = "hello\n\nand you?\n/alpha 4\n/system be kind\nhi\n/reset\nagain\n/quit\nnever read\n"
    result = run("chat", "--max-new-tokens", "8", "--seed", "3", "--ignore-eos", *loaded, stdin=said)
    assert result.exit_code == 0, result.stderr
    assert seen == [
        (["user"], 3.0),
        (["user", "assistant", "user"], 3.0),
        (["system", "user"], 4.0),
        (["system", "user"], 4.0),
    ]


def test_chat_goes_on_after_an_error_and_says_so_at_the_end(loaded: tuple[str, ...]) -> None:
    said = "/alpha lots\n/alpha 1000\n/nonsense\n" + "long " * 5000 + "\nhi\n"
    result = run("chat", "--max-new-tokens", "5", *loaded, stdin=said)
    assert result.exit_code == 1
    assert result.stderr.count("error: ") == 4
    assert result.stdout.strip()


def test_chat_refuses_what_is_no_text_and_goes_on(loaded: tuple[str, ...]) -> None:
    result = run("chat", "--max-new-tokens", "4", *loaded, stdin=b"caf\xe9\nhello\n")
    assert "without lone surrogates" in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr
    assert result.stdout.strip()


def test_chat_compare_shows_both(loaded: tuple[str, ...]) -> None:
    result = run("chat", "--compare", "--max-new-tokens", "5", *loaded, stdin="hi\n")
    assert result.exit_code == 0
    assert "guarded" in result.stdout
    assert "plain" in result.stdout


def test_guard_options(loaded: tuple[str, ...], tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"
    words = ("generate", PROMPT, "--seed", "1", "--max-new-tokens", "12", *loaded)
    plain = run(*words, "--json")
    guarded = run(*words, "--json", "--guard-threshold", "0.0001", "--audit-log", log, "--compare")
    (record,) = rows(guarded)
    assert record["steered"]["text"] == rows(plain)[0]["text"]
    assert record["finish_reason"] == "guard"
    assert record["text"] == "[removed]"
    assert record["usage"]["discarded_tokens"] > 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["action"] for line in lines] == [event["action"] for event in record["interventions"]]
    shown = run(*words, "--guard-threshold", "0.0001", "--compare")
    assert all(name in shown.stdout for name in ("plain", "steered", "guarded", "rewinds", "[removed]"))
    talk = run("chat", "--guard", "--max-new-tokens", "5", *loaded, stdin="hi\n")
    assert talk.exit_code == 0, talk.stderr
    refused = run(*words, "--guard-threshold", "2")
    assert refused.exit_code == 2
    assert "threshold" in refused.stderr


def test_chat_needs_a_template(tmp_path: Path) -> None:
    make_tiny_model(make_tiny_config("gpt2")).save_pretrained(tmp_path)
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    result = run("chat", "--model", tmp_path, "--alpha", "0", *DEVICE, stdin="hi\n")
    assert result.exit_code == 3
    assert "no chat template" in result.stderr
    assert result.stdout == ""


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
    [("bench", "bench.run_bench"), ("eval", "harness.run_eval")],
)
def test_measuring_commands_hand_on_every_option(
    command: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each keyword of what measures can be given, but the switch of its own bars."""
    import importlib
    import inspect

    place, name = f"detox_guard.evaluation.{module}".rsplit(".", 1)
    wanted = set(inspect.signature(getattr(importlib.import_module(place), name)).parameters) - {"progress"}
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
    values = {"prompts": tmp_path, "output": tmp_path, "model": "m", "detoxifier": "d", "device": "cpu"}
    values |= {"dtype": "float32", "judges": "embedded", "methods": "plain"}
    words = []
    for keyword in wanted:
        flag = flags.get(keyword, "--" + keyword.replace("_", "-"))
        words += [flag] if keyword in ("quick", "chat") else [flag, str(values.get(keyword, 2))]
    assert rows(run(command, *words, "--json")) == [{"fine": True}]
    assert set(asked) == wanted
    assert "a table" in run(command, *words).stdout


# -- real processes


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_ctrl_c_keeps_the_text_on_the_terminal_and_ends_quietly(loaded: tuple[str, ...]) -> None:
    ours, theirs = os.openpty()
    process = start("generate", PROMPT, "--max-new-tokens", "4000", "--ignore-eos", *loaded, stdout=theirs)
    os.close(theirs)
    shown = b""
    while len(shown) < len(PROMPT) + 20:
        shown += os.read(ours, 64)
    process.send_signal(signal.SIGINT)
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert PROMPT in shown.decode(errors="replace")
    assert shown.endswith(b"\n")
    assert errors.strip() == ""


def test_ctrl_c_in_a_batch_prints_what_there_is(loaded: tuple[str, ...], tmp_path: Path) -> None:
    page = tmp_path / "t.html"
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": ""}\n{"prompt": "one"}\n{"prompt": "two"}\n')
    words = ("generate", "-f", file, "--json", "--max-new-tokens", "4000", "--ignore-eos", "--trace", page)
    process = start(*words, *loaded)
    assert process.stdout is not None
    assert "error" in json.loads(process.stdout.readline())  # so the others are being decoded
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["finish_reason"] for record in records] == ["interrupted", "interrupted"]
    assert all(record["text"] for record in records)


def test_ctrl_c_stops_a_chat_reply_only(loaded: tuple[str, ...]) -> None:
    words = ("chat", "--max-new-tokens", "3000", "--ignore-eos", "--seed", "1", *loaded)
    process = start(*words, stdin=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("hello\n")
    process.stdin.flush()
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate("/alpha 1\n/quit\n", timeout=60)
    assert process.returncode == 0, errors
    assert "(stopped)" in out
    assert "α is 1." in out


def test_a_reader_that_leaves_is_no_error(loaded: tuple[str, ...]) -> None:
    decoding = ("--max-new-tokens", "40", "--ignore-eos")
    processes = [start("generate", *words, *decoding, *loaded) for words in (["one"], ["one", "two", "--json"])]
    for process in processes:
        assert process.stdout is not None
        process.stdout.close()
    for process in processes:
        assert process.stderr is not None
        errors = process.stderr.read()
        process.stderr.close()
        assert process.wait(timeout=60) == 141
        assert errors == ""


# -- small parts


def test_visible_leaves_no_control_character() -> None:
    assert visible("a\x1b[31mb\x9bc\x07\td\ne\r") == "a\ufffd[31mb\ufffdc\ufffd\td\ne\ufffd"


def token(text: str, kl: float, replaced: bool) -> TokenTrace:
    return TokenTrace(text, 1, 0.5, 0.5, 0.1, kl, 0.0, False, "x", 2 if replaced else 1, 0.5)


def test_tint_deepens_with_the_steering() -> None:
    trace = Trace((token("calm ", 0.0, True), token("some ", 0.5, False), token("\x1bmuch", float("inf"), True)))
    text = tinted(trace, "")
    assert text.plain == "calm some \ufffdmuch"
    assert [str(span.style) for span in text.spans] == [
        "not underline #1c1b1a on rgb(251,207,168)",
        "underline #1c1b1a on rgb(238,132,52)",
    ]
    console = Console(file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print(text)
    assert "48;2;238;132;52" in console.file.getvalue()  # type: ignore[attr-defined]


def test_summary_is_honest() -> None:
    def pair(plain: float, guarded: float) -> Pair:
        reply = Exchange("x", DecodingParams())
        return Pair(reply, reply, plain, guarded)

    line = summary([pair(0.8, 0.2), pair(0.3, 0.3 + BETTER / 2), pair(0.1, 0.4)])
    assert "1 of 3 got better, 1 stayed the same, 1 got worse" in line
    assert summary([]) == "Nothing to compare."


def test_system_does_not_replace_one_that_is_there() -> None:
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "hi"}]
    assert as_chat(own, "yours") == own
    assert as_chat("hi", None) == [{"role": "user", "content": "hi"}]


def test_prompt_files_keep_odd_characters_and_refuse_bad_bytes(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_bytes("a\u2028b\fc\r\n{not json\n".encode())
    assert read_prompts([], file) == ["a\u2028b\fc", "{not json"]
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        read_prompts([], file)
    file.write_bytes(b"\n \n")
    with pytest.raises(DataError, match="no prompts"):
        read_prompts([], file)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_json_holds_every_character_on_any_terminal(loaded: tuple[str, ...], encoding: str) -> None:
    prompt = "caf\xe9 \U0001f600 \u65e5\u672c"
    environ = {**os.environ, "PYTHONIOENCODING": encoding}
    words = ("generate", prompt, "x", "--json", "--max-new-tokens", "6", *loaded)
    process = start(*words, env=environ, text=None, encoding=None)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    records = [json.loads(line) for line in out.decode(encoding).splitlines()]
    assert [record["prompt"] for record in records] == [prompt, "x"]
    assert (prompt in out.decode(encoding)) == (encoding == "utf-8")


def test_half_a_character_is_escaped_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json(json.dumps({"a": "\ud800 \U0001f600"}, ensure_ascii=False))
    assert json.loads(capsys.readouterr().out) == {"a": "\ud800 \U0001f600"}
