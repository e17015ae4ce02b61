"""What tells: events, where they go, and pictures of them."""

from .events import Event as Event
from .sinks import JsonLinesSink as JsonLinesSink
from .sinks import LogSink as LogSink
from .sinks import Sink as Sink
