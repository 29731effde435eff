import os

import pytest
from support import BACKENDS

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import make_honest

    make_honest()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that takes CPU tensors on this machine."""
    name: str = request.param
    return name
