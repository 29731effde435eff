"""The choice of a backend."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from fused_kd import backends, fused_kd_loss, native
from fused_kd.backends import PREFERENCE, choose


def logits(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(2, 4, dtype=dtype)


def test_auto_takes_the_first_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSED_KD_BACKEND", raising=False)
    native_missing = PREFERENCE["cpu"].unavailable() is not None
    other = "cuda" if PREFERENCE["cuda"].unavailable() is None else "torch"  # its kernels run on the CPU in the tests
    assert choose("auto", logits(), logits()).NAME == (other if native_missing else "cpu")
    assert choose("auto", logits(torch.float64), logits()).NAME == "torch"


def test_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSED_KD_BACKEND", "torch")
    assert choose("auto", logits(), logits()).NAME == "torch"
    monkeypatch.setenv("FUSED_KD_BACKEND", "")
    expected = choose("auto", logits(), logits()).NAME
    monkeypatch.delenv("FUSED_KD_BACKEND")
    assert choose("auto", logits(), logits()).NAME == expected
    monkeypatch.setenv("FUSED_KD_BACKEND", "gpu")
    with pytest.raises(ValueError, match="FUSED_KD_BACKEND must be one of 'auto', .*got 'gpu'"):
        fused_kd_loss(logits(), logits(), alpha=1.0)


def test_a_backend_that_cannot_take_the_tensors_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PREFERENCE["cpu"], "unavailable", lambda: None)
    with pytest.raises(ValueError, match="backend='cpu' cannot be used: .*student_logits is torch.float64"):
        fused_kd_loss(logits(torch.float64), logits(), alpha=1.0, backend="cpu")
    meta = logits().to("meta")
    assert "student_logits is on meta" in str(backends.refusal(PREFERENCE["cpu"], meta, meta))


@pytest.fixture
def fresh() -> object:
    native.load.cache_clear()
    native.build_report.cache_clear()
    yield
    native.load.cache_clear()
    native.build_report.cache_clear()


def test_a_missing_library_says_why(fresh: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    monkeypatch.delenv(native.CUDA_LIBRARY, raising=False)
    with pytest.raises(ValueError, match="backend='cpu' cannot be used: .*not installed.*install it with pip"):
        fused_kd_loss(logits(), logits(), alpha=1.0, backend="cpu")
    native.load.cache_clear()
    native.build_report.cache_clear()
    (tmp_path / "_native.json").write_text(json.dumps({"cpu": {"missing": "no C++ compiler was found; install one"}}))
    assert PREFERENCE["cpu"].unavailable() == "no C++ compiler was found; install one"
    assert choose("auto", logits(), logits()).NAME == "torch"
    native.load.cache_clear()
    native.build_report.cache_clear()
    (tmp_path / "_native.json").write_text(json.dumps({"cpu": {"library": "libnone.so"}}))
    assert "libnone.so does not load" in str(PREFERENCE["cpu"].unavailable())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libc.so.6 is what is taken for another library")
def test_another_library_under_its_name_counts_as_missing(
    fresh: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    monkeypatch.delenv(native.CUDA_LIBRARY, raising=False)
    # A path from the root stays one when it is joined to a folder; a name without one would be looked for there.
    libc = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libc.so.6" in line)
    (tmp_path / "_native.json").write_text(json.dumps({"cpu": {"library": libc}}))
    assert "is not this package's" in str(PREFERENCE["cpu"].unavailable())
    assert choose("auto", logits(), logits()).NAME == "torch"


@pytest.mark.skipif("library" not in native.build_report().get("cpu", {}), reason="there is no library to cut")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have other files")
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_half_written_library_counts_as_missing(
    share: float, fresh: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    name = native.build_report()["cpu"]["library"]
    whole = (native._FOLDER / name).read_bytes()
    monkeypatch.setattr(native, "_FOLDER", tmp_path)
    monkeypatch.delenv(native.CUDA_LIBRARY, raising=False)
    native.build_report.cache_clear()
    (tmp_path / "_native.json").write_text(json.dumps({"cpu": {"library": name}}))
    (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
    assert re.search("only a part of one|does not load", str(PREFERENCE["cpu"].unavailable()))
    assert choose("auto", logits(), logits()).NAME == "torch"


def test_leading_dimensions_merge() -> None:
    x = torch.empty(2, 3, 4, 10)
    assert native.leading_layout(x) == [(24, 10)]
    assert native.leading_layout(x[:, :2]) == [(2, 120), (8, 10)]
    assert native.leading_layout(x[:, :, :1]) == [(6, 40)]
    assert native.leading_layout(x[0, 0, 0, ::2]) == []
    assert native.leading_layout(x[:1, :1, :1].expand(5, 6, 7, 10)) == [(210, 0)]
