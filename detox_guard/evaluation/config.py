"""What an evaluation and a bench may be told. Knows names and bounds; knows no model and no file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, field_validator

from detox_guard._strict import StrictModel

__all__ = ["BenchConfig", "EvalConfig"]

Count = Annotated[int, Field(ge=1)]


class EvalConfig(StrictModel):
    """What `run_eval` measures, and how. Raises `InvalidParamsError`."""

    prompts: str | None = None
    """File (.jsonl, .json, .csv, .tsv, .txt) or hub data set org/name[:split]."""
    field: str | None = None
    """Column of the text; else prompt, text, comment or context."""
    words: Count | None = None
    """Only the first words of each text."""
    chat: bool = False
    """Prompts are user turns, through the chat template."""
    passages: str | None = None
    """File of neutral text to stand before each question, as in retrieval; implies --chat."""
    passage_tokens: Count = 600
    """How much of it."""
    model: str | None = None
    """Hub id, folder or .gguf file; else the embedded default model."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    detoxifier: Any = None
    """Folder or hub id; else "auto"."""
    device: Any = None
    """cpu, cuda, cuda:N, mps; else the best there is."""
    dtype: Any = None
    """Number type of the weights; else what the device does best."""
    methods: tuple[str, ...] = ("default",)
    """What is measured beside plain. See --list-methods."""
    alphas: tuple[float, ...] = (2.0,)
    """A strength, for each method whose strength is free."""
    judges: Annotated[tuple[Any, ...], Field(min_length=1)] = ("embedded",)
    """A toxicity scorer by name; for the guard's own text, not the one that it uses."""
    lm_judges: tuple[str, ...] = ()
    """Another causal model for perplexity, besides the backbone."""
    samples: Count = 25
    """Replies a prompt, with the same seeds under every method."""
    max_new_tokens: Count = 20
    """Longest reply."""
    temperature: float = 1.0
    """Of all replies."""
    top_p: float = 0.9
    """Nucleus of all replies."""
    limit: Count = 100
    """Prompts taken of each class."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the choice of prompts and of the replies."""
    batch_rows: Annotated[int, Field(ge=2)] = 64
    """Rows of the running batch."""
    output: str | None = None
    """Folder of the run; a run cut off is taken up there."""

    @field_validator("prompts", "passages", "model", "output", mode="before")
    @classmethod
    def _path(cls, value: object) -> object:
        return str(value) if isinstance(value, Path) else value

    @field_validator("methods", "alphas", "judges", "lm_judges", mode="before")
    @classmethod
    def _many(cls, value: object) -> object:
        if isinstance(value, list | tuple):
            return tuple(float(one) if isinstance(one, int) else one for one in value)
        return value


class BenchConfig(StrictModel):
    """What `run_bench` times. Raises `InvalidParamsError`."""

    model: Any = None
    """Hub id, folder or .gguf file, or a backbone that is loaded; else the embedded default model."""
    detoxifier: Any = None
    """Folder, hub id, or "random", which costs what a trained one costs and steers nowhere; else "auto"."""
    device: str | None = None
    """cpu, cuda, cuda:N, mps; else the best there is."""
    dtype: str | None = None
    """Number type of the weights; else what the device does best."""
    tokens: Annotated[int, Field(ge=2)] = 64
    """New tokens of a reply."""
    context: Count = 600
    """Prompt tokens of the long-context case."""
    runs: Count = 5
    """Rounds after one to warm up; the median counts."""
    streams: Count = 8
    """Requests at once in the batched case."""
    quick: bool = False
    """A fraction of the work, for a first look."""

    def sized(self) -> Self:
        """With the sizes that count: small ones if `quick`."""
        if not self.quick:
            return self
        most = {"tokens": 8, "context": 40, "runs": 2, "streams": 3}
        return self.model_copy(update={name: min(getattr(self, name), bound) for name, bound in most.items()})
