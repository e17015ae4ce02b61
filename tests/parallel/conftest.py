"""Scenarios on several ranks need gloo, and processes that fork."""

import multiprocessing

import pytest
import torch.distributed as dist


@pytest.fixture(autouse=True)
def _ranks():
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("no forks on this system")
