"""detox-guard on Ray: `app` is served by Ray Serve, `DetoxiGenPredictor` is an operator of Ray Data.

One engine a replica. Knows Ray's public API and what detox-guard exports; knows no engine, no step.
"""

from __future__ import annotations

from ray_detox_guard.application import app
from ray_detox_guard.config import RayConfig, RayFile, ReplicaConfig
from ray_detox_guard.errors import ReplicaLostError
from ray_detox_guard.job import run_job
from ray_detox_guard.predictor import DetoxiGenPredictor

__all__ = ["DetoxiGenPredictor", "RayConfig", "RayFile", "ReplicaConfig", "ReplicaLostError", "app", "run_job"]
__version__ = "0.1.0"
