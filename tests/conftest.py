import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings

# How long an example takes says something of the machine, not of the code.
settings.register_profile("calm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("calm")


@pytest.fixture(autouse=True)
def _calm():
    """One thread (two on a busy machine make small tensors many times slower) and a fixed random state."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def gloo(tmp_path):
    """A process group of this process alone."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()
