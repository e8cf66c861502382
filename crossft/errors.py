"""Every error crossft raises on purpose, as one tree.

::

    CrossftError                  whatever crossft itself refuses; never wraps a bug
    ├── ConfigError               a setting: names the argument, its value, what is allowed, the remedy
    │   └── UnsafeConfigError     a configuration that names code outside the allowed packages
    ├── DataError                 a file or row of the data: names both
    │   ├── LabelError            a label outside its space, or none where one is needed
    │   └── SplitError            an empty, single-class or overlapping split
    ├── BackboneError             a backbone that cannot be loaded
    │   └── StageError            an unknown stage, or one the backbone cannot start from
    ├── CheckpointError           a checkpoint that is missing, incomplete or does not fit
    │   └── UnsafeCheckpointError a checkpoint that asks for more than tensors and plain values
    ├── RunError                  a run folder: exists, is missing, or is in the wrong state
    ├── TrainingError             training that cannot go on (diverged, out of step)
    └── Pruned                    training that a search ended early

`Interrupted` stands beside it, as KeyboardInterrupt beside Exception: a signal may come anywhere, and code that takes
every Exception of a file for the file's fault must not take the signal for one.
"""

__all__ = [
    "BackboneError",
    "CheckpointError",
    "ConfigError",
    "CrossftError",
    "DataError",
    "Interrupted",
    "LabelError",
    "Pruned",
    "RunError",
    "SplitError",
    "StageError",
    "TrainingError",
    "UnsafeCheckpointError",
    "UnsafeConfigError",
]


class CrossftError(Exception):
    """Base of all errors that crossft raises on purpose."""


class ConfigError(CrossftError, ValueError):
    """A setting that cannot work; the message names argument, value, what is allowed and the remedy."""


class UnsafeConfigError(ConfigError):
    """A configuration names code outside the allowed packages."""


class DataError(CrossftError, ValueError):
    """A file or a row of the data cannot be used; the message names it."""


class LabelError(DataError):
    """A label outside its label space, or a missing one where labels are needed."""


class SplitError(DataError):
    """A split is empty, has a single class, or overlaps another."""


class BackboneError(CrossftError, ValueError):
    """A backbone cannot be loaded or used as asked."""


class StageError(BackboneError):
    """A stage is unknown, or the backbone cannot run from it."""


class CheckpointError(CrossftError):
    """A checkpoint is missing, incomplete, corrupt, or does not fit the model."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint holds more than tensors and plain values."""


class RunError(CrossftError):
    """A run folder exists already, is missing, or is not in the state the command needs."""


class TrainingError(CrossftError, RuntimeError):
    """Training cannot go on: it diverged, or its data and its clock are out of step."""


class Interrupted(BaseException):
    """A command stopped on a signal, training after saving; ``crossft resume`` goes on.

    Attributes:
        requeue: whether the signal asked to be queued again.
    """

    def __init__(self, message: str, requeue: bool = False) -> None:
        super().__init__(message)
        self.requeue = requeue


class Pruned(CrossftError):
    """A search ended this trial early, by its validation metric; nothing is wrong with it."""
