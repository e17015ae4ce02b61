"""Grow a network while it trains: is this seed really learning? Answered from the gradients.

Importing this package imports torch and nothing else that is large; Triton is imported by the first
operation on an accelerator.
"""

import logging

from . import ops as ops
from ._loss_scale import step_if_grads as step_if_grads
from .errors import ConfigurationError as ConfigurationError
from .errors import SeedtritonError as SeedtritonError
from .errors import StateDictError as StateDictError
from .errors import TransitionError as TransitionError
from .errors import WiringError as WiringError
from .evidence import BlendProbe as BlendProbe
from .evidence import SeedEvidence as SeedEvidence
from .flat import FlatGradients as FlatGradients
from .gates import Check as Check
from .gates import Gate as Gate
from .gates import GateThresholds as GateThresholds
from .gates import QualityGates as QualityGates
from .gates import SeedStatus as SeedStatus
from .gates import Verdict as Verdict
from .growth import GrowthController as GrowthController
from .isolation import StraightThrough as StraightThrough
from .isolation import TrustRegion as TrustRegion
from .lifecycle import TRANSITIONS as TRANSITIONS
from .lifecycle import Lifecycle as Lifecycle
from .lifecycle import Stage as Stage
from .monitor import GradientMonitor as GradientMonitor
from .schedules import AlphaSchedule as AlphaSchedule
from .schedules import ProgressThreshold as ProgressThreshold
from .slot import SeedSlot as SeedSlot

__version__ = "0.1.0"

logging.getLogger("seedtriton").addHandler(logging.NullHandler())
