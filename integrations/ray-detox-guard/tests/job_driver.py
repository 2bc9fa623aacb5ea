"""A driver of its own for a batch job, so that a test can kill it: ADDRESS MODEL SOURCE OUTPUT."""

from __future__ import annotations

import sys

import ray
from detox_guard import DecodingParams

from ray_detox_guard import run_job

if __name__ == "__main__":
    address, model, source, output = sys.argv[1:]
    ray.init(address=address, logging_level="warning", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    run_job(
        lambda: ray.data.read_parquet(source),
        output,
        id_column="id",
        checkpoint=f"{output}-seen",
        workers=2,
        batch_size=64,
        rows_per_file=500,
        model=model,
        detoxifier=(),  # rows are what is counted here
        params=DecodingParams(max_new_tokens=4, ignore_eos=True),
        loading={"device": "cpu", "dtype": "float32"},
    )
