"""`DetoxiGenPredictor`: an operator of Ray Data, from a column of prompts to columns of replies. Knows rows and seeds;
knows no cluster.

A row's seed depends on the row alone. So neither the worker that decodes it, nor the rows beside it, changes its text.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
from detox_guard import ChatPrompt, DecodingParams, DetoxGuardError, Generation, InvalidParamsError, PromptError
from detox_guard.server import ModelConfig, load_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detox_guard import EngineConfig

__all__ = ["COLUMNS", "DetoxiGenPredictor"]

COLUMNS = (
    "text", "finish_reason", "seed", "prompt_tokens", "completion_tokens", "alpha", "detoxifiers", "mean_kl_steering",
    "replaced_tokens", "guard", "interventions", "error",
)  # fmt: skip
"""What the operator writes, besides the columns that it read."""


class DetoxiGenPredictor:
    """`dataset.map_batches(DetoxiGenPredictor, fn_constructor_kwargs={...}, compute=ActorPoolStrategy(size=2))`.

    Reads a column of prompts: texts, or lists of messages. Each worker loads the model once; one that cannot load its
    detoxifier does not start. Writes `COLUMNS`: "text", "finish_reason" and "seed" of the reply, how it was steered
    (means in nats a token), the "guard" (name of its scorer) and the number of its "interventions".
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        detoxifier: str | Sequence[str] | None = None,
        params: DecodingParams | None = None,
        engine: EngineConfig | None = None,
        loading: dict[str, Any] | None = None,
        prompt_column: str = "prompt",
        id_column: str | None = None,
        seed: int = 0,
        keep_errors: bool = False,
    ) -> None:
        """`model`, `detoxifier` (None is the shipped one, `()` none at all) and `loading` are as in
        `DetoxiGen.from_pretrained`; `params` with a `guard` guards the replies.

        `seed` and the row's value in `id_column` make the row's seed; without an `id_column` it is the prompt, so equal
        prompts get equal replies. A column "seed" in the data says it itself. `keep_errors`: a row that cannot be
        decoded gets its error's name in "error", and no text; else it ends the job.
        Raises `BackboneError`, `DetoxifierError`, `InvalidParamsError`, `ScorerError`.
        """
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise InvalidParamsError("seed", seed, "an integer from 0 to 2**63 - 1")
        given: dict[str, Any] = {} if engine is None else {"engine": engine.replace(when_full="wait")}
        named = (detoxifier,) if isinstance(detoxifier, str) else None if detoxifier is None else tuple(detoxifier)
        config = ModelConfig(model=model, detoxifier=named, params=params, loading=loading or {}, **given)
        self._model = load_model(config if given else config.replace(engine=config.engine.replace(when_full="wait")))
        self._params = self._model.params.replace(trace=False)
        self._prompt_column, self._id_column = prompt_column, id_column
        self._seed, self._keep_errors = seed, keep_errors

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """A batch of rows, with the columns of their replies. Raises `PromptError`, `InvalidParamsError`,
        `EngineError`, `GuardError`, `ScorerError`.
        """
        prompts = [_prompt(value) for value in self._column(batch, self._prompt_column)]
        if len(prompts) == 0:
            return {**batch, **{name: np.array([], dtype=object) for name in COLUMNS}}
        seeds = self._seeds(batch, prompts)
        replies = self._model.batch(
            prompts, [self._params.replace(seed=seed) for seed in seeds], return_exceptions=self._keep_errors
        )
        rows = [_row(reply, seed) for reply, seed in zip(replies, seeds, strict=True)]
        return {**batch, **{name: _array(name, [row[name] for row in rows]) for name in COLUMNS}}

    def _seeds(self, batch: dict[str, np.ndarray], prompts: Sequence[Any]) -> list[int]:
        if "seed" in batch:
            return [_given(value) for value in batch["seed"]]
        if self._id_column is not None:
            return [row_seed(self._seed, _plain(value)) for value in self._column(batch, self._id_column)]
        return [row_seed(self._seed, _plain(value)) for value in batch[self._prompt_column]]

    def _column(self, batch: dict[str, np.ndarray], name: str) -> np.ndarray:
        if name not in batch:
            raise InvalidParamsError("column", name, f"one of those in the data: {', '.join(batch)}")
        return batch[name]


def row_seed(seed: int, key: Any) -> int:
    """The seed of the row with this key: a hash of both, the same in every process."""
    told = json.dumps([seed, key], sort_keys=True, ensure_ascii=True).encode()
    return int.from_bytes(hashlib.sha256(told).digest()[:8], "big") >> 1


def _given(value: Any) -> int:
    seed = _plain(value)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InvalidParamsError("seed", seed, "an integer from 0 to 2**63 - 1 in every row")
    return seed


def _prompt(value: Any) -> Any:
    """A text, or messages, as they stand in a column."""
    told = _plain(value)
    if isinstance(told, list):
        return ChatPrompt([{name: part for name, part in one.items() if part is not None} for one in told])
    if not isinstance(told, str):
        raise PromptError("prompt", told, "a text, or a list of messages")
    return told


def _plain(value: Any) -> Any:
    """Arrays and numpy's numbers, as Python's own."""
    if isinstance(value, np.ndarray):
        return [_plain(one) for one in value.tolist()]
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value


def _row(reply: Generation | DetoxGuardError, seed: int) -> dict[str, Any]:
    if isinstance(reply, DetoxGuardError):
        return {**dict.fromkeys(COLUMNS), "finish_reason": "error", "seed": seed, "error": type(reply).__name__}
    steering = reply.steering
    return {
        "text": reply.text,
        "finish_reason": reply.finish_reason,
        "seed": reply.seed,
        "prompt_tokens": reply.usage.prompt_tokens,
        "completion_tokens": reply.usage.completion_tokens,
        "alpha": steering.alpha,
        "detoxifiers": ", ".join(steering.detoxifiers),
        "mean_kl_steering": steering.mean_kl_steering,
        "replaced_tokens": steering.replaced_tokens,
        "guard": reply.guard,
        "interventions": len(reply.interventions),
        "error": None,
    }


_KINDS = {
    "seed": "int64", "prompt_tokens": "int64", "completion_tokens": "int64", "replaced_tokens": "int64",
    "interventions": "int64", "alpha": "float64", "mean_kl_steering": "float64",
}  # fmt: skip


def _array(name: str, values: list[Any]) -> np.ndarray:
    """A column of one type, whatever the batch holds: blocks of one dataset must be alike."""
    if name == "seed":
        return np.array(values, dtype="int64")
    kind = _KINDS.get(name)
    if kind is None:
        return np.array(["" if value is None else value for value in values], dtype=object)
    return np.array([0 if value is None else value for value in values], dtype=kind)
