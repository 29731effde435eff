import pytest
from support import BACKENDS


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that takes CPU tensors on this machine."""
    name: str = request.param
    return name
