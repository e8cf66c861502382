"""Checkpoints, logs and progress of a run."""

from crossft.callbacks.monitoring.anchors import Anchors
from crossft.callbacks.monitoring.checkpoint_io import AtomicCheckpointIO, latest_valid, load_checkpoint
from crossft.callbacks.monitoring.checkpoints import Checkpoints
from crossft.callbacks.monitoring.drift import Drift, stage_drift
from crossft.callbacks.monitoring.finite import FiniteCheck
from crossft.callbacks.monitoring.health import Health
from crossft.callbacks.monitoring.ledger import Ledger, ledger_rows
from crossft.callbacks.monitoring.pruning import Pruning
from crossft.callbacks.monitoring.rate_range import RateRange
from crossft.callbacks.monitoring.run_log import RunLog
from crossft.callbacks.monitoring.scores import Scores
from crossft.callbacks.monitoring.stopping import Stopping

__all__ = [
    "Anchors",
    "AtomicCheckpointIO",
    "Checkpoints",
    "Drift",
    "FiniteCheck",
    "Health",
    "Ledger",
    "Pruning",
    "RateRange",
    "RunLog",
    "Scores",
    "Stopping",
    "latest_valid",
    "ledger_rows",
    "load_checkpoint",
    "stage_drift",
]
