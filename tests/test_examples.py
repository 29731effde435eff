"""The examples run as they stand, on small random models, and come to what they claim."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# What rounding makes of twelve steps of AdamW; over five seeds 3.1e-7 was seen.
BOUND = 1e-6
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def distill_smollm2() -> Iterator[ModuleType]:
    pytest.importorskip("transformers", reason="the example needs transformers; pip install transformers")
    pytest.importorskip("matplotlib", reason="the example needs matplotlib; pip install matplotlib")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)  # for the processes that the example starts, too
        import distill_smollm2  # noqa: PLC0415 (the path leads to it only now)

        yield distill_smollm2


def test_distill_smollm2(distill_smollm2: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "curves.png"
    steps = 12
    runs = distill_smollm2.main(
        ["--tiny", "--steps", str(steps), "--batch", "8", "--length", "64", "--output", str(picture)]
    )
    fused, eager = runs["FusedLinearKDLoss"], runs["eager PyTorch"]
    assert len(fused.curve) == len(eager.curve) == steps
    assert fused.curve == pytest.approx(eager.curve, rel=BOUND)
    assert fused.before == eager.before
    assert fused.after == pytest.approx(eager.after, rel=BOUND)
    for run in runs.values():
        assert run.after < 0.8 * run.before
        assert 0 < run.loaded <= run.peak
    assert picture.read_bytes().startswith(PNG)
    text = capsys.readouterr().out
    assert f"{fused.before:.4g} -> {fused.after:.4g}" in text
