"""Every shared case in Triton's interpreter, on CPU tensors."""

import pytest
from kernel_cases import *  # noqa: F403
from kernel_cases import _launch, gradient_sums
from triton.runtime.interpreter import InterpretedFunction

# The interpreter computes with numpy, which warns where a GPU just answers inf or NaN.
# Before Triton 3.7 it also leaned on a conversion that numpy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:Conversion of an array:DeprecationWarning")


@pytest.fixture(scope="module")
def device():
    return "cpu"


def test_the_interpreter_is_really_on():
    assert isinstance(gradient_sums._sums_kernel, InterpretedFunction)
    assert _launch.INTERPRETED
