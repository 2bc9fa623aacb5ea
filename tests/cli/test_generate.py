"""`detox-guard generate`: streamed, in batches, as JSON, compared, traced."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING

import pytest
from commands import DEVICE, PROMPT, rows, run, start
from tiny import make_tiny_config, make_tiny_model, make_tiny_tokenizer

from detox_guard._adaptive import adaptive_alpha
from detox_guard.cli.console import print_json
from detox_guard.settings import DecodingParams

if TYPE_CHECKING:
    from pathlib import Path


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
    used = f"steered · α {adaptive_alpha([PROMPT], DecodingParams()):.3g}"
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


def test_a_model_without_a_detoxifier_is_steered_by_texts(model: Path) -> None:
    words = ("generate", PROMPT, "--model", model, *DEVICE, "--max-new-tokens", "4")
    assert run(*words, "--alpha", "0").exit_code == 0
    (record,) = rows(run(*words, "--json"))
    assert record["detoxifiers"]
    assert all(":text:" in name for name in record["detoxifiers"])


def test_a_detoxifier_that_is_not_there_is_an_error(model: Path) -> None:
    asked = run("generate", PROMPT, "--model", model, "--detoxifier", "./absent", *DEVICE)
    assert asked.exit_code == 3
    assert re.fullmatch(r"error: .*\nhint: .*\n", asked.stderr)
    assert asked.stdout == ""


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
