"""The closing table: each contender's median beside the yardstick of its group, and its peak extra memory."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from contenders import COPY, SHAPES
from linear_contenders import LINEAR_SHAPES


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fused_kd")
    group.addoption(
        "--shapes",
        default=SHAPES["cuda" if torch.cuda.is_available() else "cpu"],
        help="comma-separated ROWSxVOCABULARY (default: %(default)s)",
    )
    group.addoption(
        "--linear-shapes",
        default=LINEAR_SHAPES["cuda" if torch.cuda.is_available() else "cpu"],
        help="comma-separated ROWSxWIDTHxVOCABULARY, of the loss from hidden states (default: %(default)s)",
    )
    group.addoption("--dtypes", default="float32,bfloat16", help="comma-separated dtypes (default: %(default)s)")
    group.addoption("--scaling", action="store_true", help="add shapes that show time against N and V")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        shapes = metafunc.config.getoption("--shapes").split(",")
        if metafunc.config.getoption("--scaling"):
            shapes += ["128x128256", "512x128256", "256x64128", "256x256512"]
        metafunc.parametrize("shape", [tuple(map(int, s.split("x"))) for s in shapes], ids=shapes)
    if "linear_shape" in metafunc.fixturenames:
        shapes = metafunc.config.getoption("--linear-shapes").split(",")
        metafunc.parametrize("linear_shape", [tuple(map(int, s.split("x"))) for s in shapes], ids=shapes)
    if "dtype" in metafunc.fixturenames:
        dtypes = metafunc.config.getoption("--dtypes").split(",")
        metafunc.parametrize("dtype", [getattr(torch, name) for name in dtypes], ids=dtypes)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, dict[str, Any]] = defaultdict(dict)
    for bench in session.benchmarks if session else ():
        if not bench.has_error:
            groups[bench.group][bench.extra_info["contender"]] = bench
    for group, rows in groups.items():
        on_gpu = torch.cuda.is_available()
        place = torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads"
        terminalreporter.section(f"{group}, {place}, torch {torch.__version__}")
        name = next(iter(rows.values())).extra_info["yardstick"]
        yardstick = rows[name].stats.median if name in rows else None
        bandwidth = speed(rows[COPY]) if COPY in rows else None
        terminalreporter.write_line(
            f"{'':28}{'median ms':>10}{f'of {name}':>15}{'peak extra MiB':>16}{'of logits':>11}"
            + (f"{'GB/s':>9}{'of copy':>9}" if bandwidth else "")
        )
        for name, bench in sorted(rows.items(), key=lambda item: item[1].stats.median):
            ratio = f"{bench.stats.median / yardstick:11.2f}x" if yardstick else ""
            peak = bench.extra_info["peak_extra_bytes"]
            terminalreporter.write_line(
                f"{name:28}{bench.stats.median * 1e3:10.3f}{ratio:>15}{peak / 2**20:16.1f}"
                f"{peak / bench.extra_info['logits_bytes']:10.2f}x"
                + (f"{speed(bench) / 1e9:9.0f}{100 * speed(bench) / bandwidth:8.0f}%" if bandwidth else "")
            )


def speed(bench: Any) -> float:
    """Bytes that had to be moved, a second."""
    return float(bench.extra_info["bytes"] / bench.stats.median)
