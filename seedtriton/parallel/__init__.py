"""What meets other ranks: which holds what, what is agreed and when, and how a seed joins a model that is wrapped."""

from .checkpointed import Checkpointed as Checkpointed
from .ranks import Ranks as Ranks
