"""Prompts, passages and judges, good and bad."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from measuring import LengthJudge, written
from tiny import SENTENCES

from detox_guard.errors import DataError, InvalidParamsError, ScorerError
from detox_guard.evaluation import (
    EvalPrompt,
    choose_prompts,
    read_passages,
    read_prompts,
)
from detox_guard.evaluation.lms import LMJudge, reply_nll
from detox_guard.scorers.base import load_scorer

if TYPE_CHECKING:
    from pathlib import Path

    from detox_guard.models.backbone import Backbone


def test_likelihoods_do_not_depend_on_the_batch(tiny_llama: Backbone) -> None:
    prompt = tiny_llama.tokenizer(SENTENCES[0])["input_ids"]
    replies = [tiny_llama.tokenizer(SENTENCES[1 + i % 3])["input_ids"][: 3 + i % 5] for i in range(70)]
    together = reply_nll(tiny_llama, prompt, replies)
    alone = [reply_nll(tiny_llama, prompt, [reply])[0] for reply in replies[::9]]
    assert together[::9] == pytest.approx(alone, rel=1e-4)


def test_another_model_judges_in_its_own_tokens(tiny_gpt2: Backbone) -> None:
    judge = LMJudge(tiny_gpt2)
    ids = tiny_gpt2.tokenizer(" kind words")["input_ids"]
    (nats, tokens), empty = judge.judge("So many", [" kind words", ""], [[1], []])
    assert (tokens, empty) == (len(ids), (0.0, 0))
    assert nats == pytest.approx(reply_nll(tiny_gpt2, tiny_gpt2.tokenizer("So many")["input_ids"], [ids])[0])
    assert judge.judge([{"role": "user", "content": "So many"}], [" kind"], [[1]])[0][0] > 0


def test_prompts_are_read_and_chosen_by_label(prompts_file: Path) -> None:
    prompts = read_prompts(prompts_file)
    assert [prompt.text for prompt in prompts] == SENTENCES  # the row without a label is left out
    chosen = choose_prompts(prompts, 2, seed=5)
    assert [prompt.classes for prompt in chosen] == [("toxic",), ("toxic",), ("non-toxic",), ("non-toxic",)]
    assert chosen == choose_prompts(prompts, 2, seed=5)
    assert len({tuple(choose_prompts(prompts, 2, seed=seed)) for seed in range(10)}) > 1
    assert EvalPrompt("at the border", 0.5).group == "toxic"
    with pytest.raises(InvalidParamsError, match="limit"):
        choose_prompts(prompts, 0, seed=5)


def test_challenging_prompts_count_where_they_were_drawn() -> None:
    prompts = [EvalPrompt(f"toxic {i}", 0.9) for i in range(9)] + [EvalPrompt("hard", 0.1, challenging=True)]
    classes = {prompt.text: prompt.classes for prompt in choose_prompts(prompts, 3, seed=0)}
    assert classes.pop("hard") == ("non-toxic", "challenging")
    assert set(classes.values()) == {("toxic",)}
    # a limit that leaves it out of its label's class leaves it in the other
    prompts = [EvalPrompt("hard", 0.9, challenging=True), *(EvalPrompt(f"toxic {i}", 0.9) for i in range(99))]
    drawn = [prompt.classes for prompt in choose_prompts(prompts, 1, seed=1) if prompt.challenging]
    assert drawn == [("challenging",)]


def test_plain_prompts_have_no_label(tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_text('\n{"prompt": "One"}\n\n{"prompt": "Two"}\n')
    assert [(p.text, p.group) for p in read_prompts(path)] == [("One", "all"), ("Two", "all")]


def test_formats_of_prompts(tmp_path: Path) -> None:
    nested = {"text": "One", "toxicity": 0.7, "insult": 0.9, "threat": None, "profanity": 0.49}
    path = written(tmp_path / "rtp.jsonl", json.dumps({"challenging": True, "prompt": nested}))
    assert read_prompts(path) == [EvalPrompt("One", 0.7, challenging=True, categories=("insult",))]

    table = 'id,comment,toxic,category\n1,"Two, and\nmore words",True,talk\n2,Three,False,\n'
    path = written(tmp_path / "table.csv", table)
    assert read_prompts(path) == [
        EvalPrompt("Two, and\nmore words", 1.0, categories=("talk",)),
        EvalPrompt("Three", 0.0),
    ]
    assert [prompt.text for prompt in read_prompts(path, words=2)] == ["Two, and", "Three"]
    assert [prompt.text for prompt in read_prompts(path, field="id")] == ["1", "2"]
    with pytest.raises(DataError, match=r"line 3: no prompt text .no 'body'"):
        read_prompts(path, field="body")
    with pytest.raises(InvalidParamsError, match="words"):
        read_prompts(path, words=0)

    path = written(tmp_path / "lines.txt", "Four \u2028 here\n\n  \nFive\n")
    assert [prompt.text for prompt in read_prompts(path)] == ["Four \u2028 here", "Five"]

    path = written(
        tmp_path / "bold.json", json.dumps({"poets": {"A_Poet": ["The poet ", " ", "A poem "]}, "cooks": {}})
    )
    assert read_prompts(path) == [
        EvalPrompt("The poet", categories=("poets",)),
        EvalPrompt("A poem", categories=("poets",)),
    ]
    path = written(tmp_path / "rows.json", json.dumps([{"context": "Six", "response": "no", "category": "c"}]))
    assert read_prompts(path) == [EvalPrompt("Six", categories=("c",))]
    with pytest.raises(DataError, match="row 1: no prompt text"):
        read_prompts(written(tmp_path / "other.json", '{"a": {"b": 1}, "c": 2}'))


def test_a_hub_set_is_fetched_by_its_split(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load(name: str, split: str) -> Any:
        asked.append((name, split))
        if name == "org/absent":
            raise FileNotFoundError("not there")
        return datasets.Dataset.from_list([{"prompt": {"text": "One", "toxicity": 0.9}, "challenging": False}])

    monkeypatch.setattr(datasets, "load_dataset", load)  # no hub can be reached from a test
    assert read_prompts("org/set:test[:5]") == [EvalPrompt("One", 0.9)]
    assert asked == [("org/set", "test[:5]")]
    with pytest.raises(DataError, match="org/absent:train: cannot be fetched: not there"):
        read_prompts("org/absent")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"prompt": "fine"}\nno json', "line 2: not JSON"),
        (b"[1]", "line 1: no prompt text"),
        (b'{"other": "a field"}', "line 1: no prompt text"),
        (b'{"prompt": "x", "challenging": "perhaps"}', "neither true nor false"),
        (b'{"prompt": "  "}', "line 1: no prompt text"),
        (b'{"prompt": {"toxicity": 0.5}}', "line 1: no prompt text"),
        (b'{"prompt": "\\ud800"}', "line 1: no prompt text .not valid UTF-8"),
        (b'{"prompt": {"text": "x", "toxicity": 2}}', "is no number in"),
        (b'{"prompt": {"text": "x", "toxicity": NaN}}', "is no number in"),
        (b"\n\n", "no prompt in it"),
        (b"\xff\xfe\x00", "binary"),
        (b"\xff\xfe", "line 1: not JSON"),
    ],
)
def test_bad_prompt_files(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_prompts(path)


def test_missing_files(tmp_path: Path) -> None:
    for read in (read_prompts, read_passages):
        with pytest.raises(DataError, match="no such file"):
            read(tmp_path / "absent.jsonl")


def test_passages(tmp_path: Path) -> None:
    squad = tmp_path / "squad.json"
    squad.write_text(
        json.dumps({"data": [{"paragraphs": [{"context": "One."}, {"context": "Two."}, {"context": "One."}]}]})
    )
    assert read_passages(squad) == ["One.", "Two."]
    text = tmp_path / "passages.txt"
    text.write_text("First line\nof a paragraph.\n\nSecond.\n")
    assert read_passages(text) == ["First line of a paragraph.", "Second."]
    text.write_text("One a line.\nAnother.\n")
    assert read_passages(text) == ["One a line.", "Another."]
    for content, said in (("{}", "SQuAD"), ("nothing", "not JSON"), ('{"data": []}', "no passage")):
        squad.write_text(content)
        with pytest.raises(DataError, match=said):
            read_passages(squad)


def test_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_scorer("embedded").name == "embedded"
    judge = LengthJudge()
    assert load_scorer(judge) is judge
    monkeypatch.setitem(__import__("sys").modules, "profanity_check", None)
    with pytest.raises(ScorerError, match="not installed"):
        load_scorer("profanity-check")


def test_profanity_check() -> None:
    pytest.importorskip("profanity_check", reason="alt-profanity-check is not installed")
    judge = load_scorer("profanity-check")
    mild, rude = judge.score(["What a lovely garden.", "You stupid idiot."])
    assert 0 <= mild < 0.5 < rude <= 1
    assert judge.score([]) == []
