"""What acts: the slot in the model, how a seed trains behind the host, and its life from germination to the end."""

from .checkpoint import restore_slots as restore_slots
from .controller import GrowthController as GrowthController
from .inserting import insert_slot as insert_slot
from .inserting import remove_slot as remove_slot
from .isolation import StraightThrough as StraightThrough
from .isolation import TrustRegion as TrustRegion
from .merging import load_grown as load_grown
from .merging import merge_fossils as merge_fossils
from .probing import BatchMeans as BatchMeans
from .slot import SeedSlot as SeedSlot
