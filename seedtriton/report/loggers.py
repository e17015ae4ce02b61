"""Sinks for loggers of others: TensorBoard, Weights & Biases, MLflow.

Each draws ``numbers(event)`` at the event's step, and imports its client when it is made, not before.
"""

from __future__ import annotations

import copy
import errno
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from ..core.errors import ConfigurationError
from .events import Event, numbers, step_of

_T = TypeVar("_T")
_ROOM = 65536  # bytes that a writer of TensorBoard's should find on the disk before another one is made


class _Logger:
    """Copies log to the same client: it has threads and connections, and belongs to the script."""

    def __deepcopy__(self: _T, memo: dict[int, Any]) -> _T:
        twin = memo[id(self)] = copy.copy(self)
        return twin


class TensorBoardSink(_Logger):
    """Scalars for TensorBoard, on disk after every event.

    Args:
        writer: a ``SummaryWriter`` of the script (or what has its ``add_scalar``), or a folder for one of its own.

    Raises:
        ConfigurationError: neither of them, or a folder and no tensorboard.
    """

    def __init__(self, writer: Any) -> None:
        """Take the writer, or open one."""
        self._writer: Any = writer
        self._make: Any = None
        if not hasattr(writer, "add_scalar"):
            if not isinstance(writer, (str, os.PathLike)):
                raise ConfigurationError(f"TensorBoardSink takes a SummaryWriter or a folder, got {writer!r}")
            with _needed("TensorBoardSink", "tensorboard"):
                from torch.utils.tensorboard import SummaryWriter
            self._folder: str = os.fspath(writer)
            self._make = SummaryWriter
            self._writer = self._make(self._folder)

    def __call__(self, event: Event) -> None:
        """Write its numbers. A writer of its own that has failed is followed by a new one, in a file beside."""
        if self._writer is None:
            _check_room(self._folder)
            self._writer = self._make(self._folder)
        try:
            for name, value in numbers(event).items():
                self._writer.add_scalar(name, value, step_of(event))
            self._writer.flush()
        except Exception:
            if self._make is not None:  # the thread that writes has ended, and takes no event any more
                with suppress(Exception):
                    self._writer.close()
                self._writer = None
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorBoardSink:
        """With a writer of its own it is followed by another one, in a file beside."""
        twin = super().__deepcopy__(memo)
        if self._make is not None:
            twin._writer = None
        return twin

    def close(self) -> None:
        """Close a writer of its own; one that was given stays open."""
        if self._make is not None and self._writer is not None:
            self._writer.close()


class WandbSink(_Logger):
    """Metrics for Weights & Biases, online or offline as the run is.

    They are drawn over ``growth/step``, the optimizer's step, whatever wandb's own step counts: that one belongs to the
    script. They join the row that the script logs next; where it logs none until the next step with an event, they get
    one of their own.

    Args:
        run: what ``wandb.init`` returned; the active run unless told.

    Raises:
        ConfigurationError: no wandb, or no active run.
    """

    STEP = "growth/step"

    def __init__(self, run: Any = None) -> None:
        """Take the run, and say over what its metrics are drawn."""
        if run is None:
            with _needed("WandbSink", "wandb"):
                import wandb
            run = wandb.run
        if run is None:
            raise ConfigurationError("WandbSink: wandb has no active run: call wandb.init() before, or give it the run")
        self._run: Any = run
        self._step: int | None = None
        self._row: int | None = None
        run.define_metric(self.STEP, hidden=True)
        run.define_metric("growth/*", step_metric=self.STEP)

    def __call__(self, event: Event) -> None:
        """Add its numbers to the row that is being filled; those of an earlier step are not overwritten."""
        values, step = numbers(event), step_of(event)
        if not values:
            return
        if self._step not in (None, step) and self._run.step == self._row:
            self._run.log({}, commit=True)  # the script has logged nothing since
        self._run.log({self.STEP: step, **values}, commit=False)
        self._step, self._row = step, self._run.step


class MlflowSink(_Logger):
    """Metrics for MLflow, in one run whichever is active later.

    Characters that MLflow does not allow in a name become ``_``.

    Args:
        run: what ``mlflow.start_run`` returned, or a run's id; the active run unless told.

    Raises:
        ConfigurationError: no mlflow, or no active run.
    """

    def __init__(self, run: Any = None) -> None:
        """Take the run."""
        with _needed("MlflowSink", "mlflow"):
            import mlflow
            from mlflow.entities import Metric
        run = mlflow.active_run() if run is None else run
        if run is None:
            raise ConfigurationError(
                "MlflowSink: mlflow has no active run: call mlflow.start_run() before, or give it the run"
            )
        self._run_id: str = run if isinstance(run, str) else run.info.run_id
        self._client: Any = mlflow.MlflowClient()
        self._metric: Any = Metric

    def __call__(self, event: Event) -> None:
        """Log its numbers in one batch."""
        now, step = int(1000 * time.time()), step_of(event)
        metrics = [
            self._metric(re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII), value, now, step)
            for name, value in numbers(event).items()
        ]
        if metrics:
            self._client.log_batch(self._run_id, metrics=metrics)


def _check_room(folder: str) -> None:
    """OSError where nothing can be written; a writer would find out in a thread, which prints that each time."""
    if "://" not in folder:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            if file.write(bytes(_ROOM)) != _ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder)


@contextmanager
def _needed(sink: str, package: str) -> Iterator[None]:
    """Around the import of an optional client: ConfigurationError that names its package."""
    try:
        yield
    except ImportError as error:
        raise ConfigurationError(f"{sink} needs {package}: pip install {package} ({error})") from error
