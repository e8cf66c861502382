"""Tasks: LightningModules that wrap a backbone with heads, a loss and metrics."""

from crossft.tasks.base import Task
from crossft.tasks.classification import Classification
from crossft.tasks.fsdp2 import FSDP2
from crossft.tasks.regression import Regression

__all__ = ["FSDP2", "Classification", "Regression", "Task"]
