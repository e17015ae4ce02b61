import pytest
import torch
from hypothesis import HealthCheck, settings

# How long an example takes says something of the machine, not of the code.
settings.register_profile("calm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("calm")


@pytest.fixture(autouse=True)
def _calm():
    """One thread (two on a busy machine make small tensors many times slower) and a fixed random state."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
