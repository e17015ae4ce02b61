import pytest
import torch


@pytest.fixture(autouse=True)
def _calm():
    """One thread (two on a busy machine make small tensors many times slower) and a fixed random state."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
