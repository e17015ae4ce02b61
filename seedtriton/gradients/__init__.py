"""What measures: sums of gradients, the ring, and what of them reaches the host."""

from . import ops as ops
from .flat import FlatGradients as FlatGradients
from .loss_scale import step_if_grads as step_if_grads
from .monitor import GradientMonitor as GradientMonitor
