"""Grow a network while it trains: is this seed really learning? Answered from the gradients.

Importing this package imports torch and nothing else that is large; Triton is imported by the first
operation on an accelerator.
"""

import sys

from . import core, gradients, growth, report
from .core import TRANSITIONS as TRANSITIONS
from .core import AlphaSchedule as AlphaSchedule
from .core import BlendProbe as BlendProbe
from .core import Check as Check
from .core import ConfigurationError as ConfigurationError
from .core import Gate as Gate
from .core import GateThresholds as GateThresholds
from .core import Lifecycle as Lifecycle
from .core import PairProbe as PairProbe
from .core import ProgressThreshold as ProgressThreshold
from .core import QualityGates as QualityGates
from .core import SeedEvidence as SeedEvidence
from .core import SeedStatus as SeedStatus
from .core import SeedtritonError as SeedtritonError
from .core import Stage as Stage
from .core import StateDictError as StateDictError
from .core import TransitionError as TransitionError
from .core import Verdict as Verdict
from .core import WiringError as WiringError
from .gradients import FlatGradients as FlatGradients
from .gradients import GradientMonitor as GradientMonitor
from .gradients import ops as ops
from .gradients import step_if_grads as step_if_grads
from .growth import BatchMeans as BatchMeans
from .growth import GrowthController as GrowthController
from .growth import SeedSlot as SeedSlot
from .growth import StraightThrough as StraightThrough
from .growth import TrustRegion as TrustRegion
from .growth import insert_slot as insert_slot
from .growth import load_grown as load_grown
from .growth import merge_fossils as merge_fossils
from .growth import remove_slot as remove_slot
from .growth import restore_slots as restore_slots
from .parallel import Ranks as Ranks

__version__ = "0.1.0"

# Modules that users import by these names since 0.1, ``seedtriton.ops`` say; inside the house they lie in their wings.
_names = {
    "errors": core.errors, "evidence": core.evidence, "gates": core, "lifecycle": core.lifecycle,
    "schedules": core.schedules, "flat": gradients.flat, "monitor": gradients.monitor, "ops": gradients.ops,
    "reference": gradients.reference, "blending": growth.blending, "isolation": growth.isolation,
    "probing": growth.probing, "slot": growth.slot, "telemetry": report.sinks,
}  # fmt: skip
for _name, _module in _names.items():
    sys.modules[f"{__name__}.{_name}"] = globals()[_name] = _module
