"""What tells: events, where they go, and pictures of them."""

from .events import Event as Event
from .events import numbers as numbers
from .history import History as History
from .loggers import MlflowSink as MlflowSink
from .loggers import TensorBoardSink as TensorBoardSink
from .loggers import WandbSink as WandbSink
from .sinks import CallableSink as CallableSink
from .sinks import CsvSink as CsvSink
from .sinks import JsonLinesSink as JsonLinesSink
from .sinks import LogSink as LogSink
from .sinks import Sink as Sink
from .summary import Summary as Summary
