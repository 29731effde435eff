import os
from collections.abc import Iterator

import pytest
import torch
from support import BACKENDS, GPU_BACKENDS

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests of trainers download nothing, and report to nobody

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import make_honest

    make_honest()

_ON_GPU = " on a GPU"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", metavar="I/N", help="every N-th test, from number I on")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    part = config.getoption("--part")
    if part is not None:
        first, step = map(int, part.split("/"))
        items[:] = items[first::step]
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


@pytest.fixture(params=[*BACKENDS, *(pytest.param(name + _ON_GPU, marks=pytest.mark.gpu) for name in GPU_BACKENDS)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that takes CPU tensors on this machine; with -m gpu, each that takes a GPU's, with these tensors."""
    name: str = request.param
    if not name.endswith(_ON_GPU):
        yield name
        return
    if not torch.cuda.is_available():
        pytest.skip("this machine has no GPU, or PyTorch no support for it")
    torch.set_default_device("cuda")
    yield name.removesuffix(_ON_GPU)
    torch.set_default_device(None)
