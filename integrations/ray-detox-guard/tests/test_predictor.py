"""The operator for batches, by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from detox_guard import (
    DecodingParams,
    DetoxifierError,
    GuardPolicy,
    InvalidParamsError,
    PromptError,
    PromptTooLongError,
)

from ray_detox_guard import DetoxiGenPredictor
from ray_detox_guard.predictor import COLUMNS
from small import save_tiny

if TYPE_CHECKING:
    from pathlib import Path

PARAMS = DecodingParams(max_new_tokens=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def predictor(folder: str) -> DetoxiGenPredictor:
    return DetoxiGenPredictor(folder, params=PARAMS, loading={"device": "cpu"}, id_column="id")


def rows(*ids: int) -> dict[str, np.ndarray]:
    return {"id": np.array(ids), "prompt": np.array([f"The mayor {i % 2}" for i in ids], dtype=object)}


def test_a_rows_text_is_its_own_in_whatever_batch(predictor: DetoxiGenPredictor) -> None:
    whole, part = predictor(rows(0, 1, 2, 3)), predictor(rows(2, 1))
    assert list(part["text"]) == [whole["text"][2], whole["text"][1]]
    assert list(part["seed"]) == [whole["seed"][2], whole["seed"][1]]
    assert len(set(whole["seed"])) == 4, "equal prompts of other rows get other seeds"


def test_every_column_is_written_and_says_how_the_row_was_steered(predictor: DetoxiGenPredictor) -> None:
    told = predictor(rows(7))
    assert set(told) == {"id", "prompt", *COLUMNS}
    assert told["finish_reason"][0] in ("length", "stop")
    assert told["alpha"][0] > 0
    assert told["mean_kl_steering"][0] > 0
    assert told["detoxifiers"][0]
    assert 0 < told["completion_tokens"][0] <= 8


def test_a_seed_in_the_data_comes_first_and_repeats_the_model(predictor: DetoxiGenPredictor) -> None:
    told = predictor({**rows(0, 1), "seed": np.array([11, 11])})
    same = predictor({**rows(2, 3), "seed": np.array([11, 11])})
    assert list(told["text"]) == list(same["text"])
    assert list(told["seed"]) == [11, 11]


def test_columns_are_of_one_type_with_errors_and_without(folder: str) -> None:
    keeping = DetoxiGenPredictor(folder, params=PARAMS, loading={"device": "cpu"}, keep_errors=True)
    told = keeping({"prompt": np.array(["fine", "x" * 9000], dtype=object)})
    assert list(told["error"]) == ["", PromptTooLongError.__name__]
    assert told["finish_reason"][1] == "error"
    assert told["text"][1] == ""
    fine = keeping({"prompt": np.array(["fine"], dtype=object)})
    assert {name: told[name].dtype for name in COLUMNS} == {name: fine[name].dtype for name in COLUMNS}
    assert fine["text"][0] == told["text"][0]


def test_an_error_ends_the_job_where_none_are_kept(predictor: DetoxiGenPredictor) -> None:
    with pytest.raises(PromptTooLongError):
        predictor({"id": np.array([1]), "prompt": np.array(["x" * 9000], dtype=object)})


def test_messages_are_prompts_too_and_a_guard_is_named(folder: str) -> None:
    guarded = DetoxiGenPredictor(folder, params=PARAMS.replace(guard=GuardPolicy()), loading={"device": "cpu"})
    prompts = np.empty(1, dtype=object)
    prompts[0] = np.array([{"role": "user", "content": "Hi"}], dtype=object)
    assert guarded({"prompt": prompts})["guard"][0]


def test_no_rows_keep_their_columns(predictor: DetoxiGenPredictor) -> None:
    assert set(predictor({"id": np.array([]), "prompt": np.array([], dtype=object)})) == {"id", "prompt", *COLUMNS}


@pytest.mark.parametrize("batch", [{"text": np.array(["a"])}, {"prompt": np.array(["a"])}])
def test_a_missing_column_is_named(predictor: DetoxiGenPredictor, batch: dict[str, np.ndarray]) -> None:
    with pytest.raises(InvalidParamsError, match="one of those in the data"):
        predictor(batch)


def test_what_is_no_prompt_is_named(predictor: DetoxiGenPredictor) -> None:
    with pytest.raises(PromptError):
        predictor({"id": np.array([1]), "prompt": np.array([3])})


def test_bad_seeds_are_refused(folder: str) -> None:
    with pytest.raises(InvalidParamsError, match="seed"):
        DetoxiGenPredictor(folder, seed=-1)


def test_a_worker_without_its_detoxifier_does_not_start(folder: str, tmp_path: Path) -> None:
    with pytest.raises(DetoxifierError):
        DetoxiGenPredictor(folder, detoxifier=str(tmp_path / "none"), loading={"device": "cpu"})
