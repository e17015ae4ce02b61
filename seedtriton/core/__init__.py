"""What decides: the life of a seed, its evidence and the gates. Standard library only."""

from .errors import ConfigurationError as ConfigurationError
from .errors import SeedtritonError as SeedtritonError
from .errors import StateDictError as StateDictError
from .errors import TransitionError as TransitionError
from .errors import WiringError as WiringError
from .evidence import SeedEvidence as SeedEvidence
from .gates import QualityGates as QualityGates
from .lifecycle import TRANSITIONS as TRANSITIONS
from .lifecycle import Lifecycle as Lifecycle
from .lifecycle import Stage as Stage
from .pairs import PairProbe as PairProbe
from .probe import BlendProbe as BlendProbe
from .schedules import AlphaSchedule as AlphaSchedule
from .schedules import ProgressThreshold as ProgressThreshold
from .thresholds import GateThresholds as GateThresholds
from .verdict import Check as Check
from .verdict import Gate as Gate
from .verdict import SeedStatus as SeedStatus
from .verdict import Verdict as Verdict
