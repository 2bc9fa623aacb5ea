"""`run_job`: a batch job that goes on where it was. Knows Ray Data's checkpoints; knows no decoding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from detox_guard import InvalidParamsError
from ray.data import ActorPoolStrategy, DataContext
from ray.data.checkpoint import CheckpointConfig

from ray_detox_guard.predictor import DetoxiGenPredictor

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray.data import Dataset

__all__ = ["run_job"]


def run_job(
    read: Callable[[], Dataset],
    output: str,
    *,
    id_column: str,
    checkpoint: str,
    workers: int = 1,
    batch_size: int = 64,
    rows_per_file: int = 1024,
    cpus: float = 1.0,
    gpus: float = 0.0,
    **predictor: Any,
) -> None:
    """Replies to all rows of `read()`, as Parquet files in the folder `output`; each row once.

    `id_column` names the rows: no two alike. `rows_per_file` rows are decoded, written and remembered in `checkpoint`
    (a folder that all nodes see) together, so no more are lost with a worker. A job that was cut off is started again
    by the same call, and decodes what is missing. `cpus` and `gpus` are a worker's; other keywords are those of
    `DetoxiGenPredictor`. `read` is called once the checkpoint is set, and must read files (`ray.data.read_parquet`, …):
    Ray Data remembers no others.
    Raises `InvalidParamsError`, and what Ray and the predictor raise.
    """
    for name, value in (("workers", workers), ("batch_size", batch_size), ("rows_per_file", rows_per_file)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidParamsError(name, value, "an integer of at least 1")
    context = DataContext.get_current()
    before = context.checkpoint_config
    context.checkpoint_config = CheckpointConfig(
        id_column=id_column, checkpoint_path=checkpoint, delete_checkpoint_on_success=False
    )
    try:
        rows = read()
        if (columns := rows.columns(fetch_if_missing=False)) is not None and id_column not in columns:
            raise InvalidParamsError("id_column", id_column, f"one of the columns: {', '.join(columns)}")
        replies = rows.repartition(target_num_rows_per_block=rows_per_file).map_batches(
            DetoxiGenPredictor,
            fn_constructor_kwargs={**predictor, "id_column": id_column},
            batch_size=batch_size,
            compute=ActorPoolStrategy(size=workers),
            num_cpus=cpus,
            num_gpus=gpus,
        )
        replies.write_parquet(output)
    finally:
        context.checkpoint_config = before
