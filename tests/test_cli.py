"""The command line: `fused-kd info` on any installation, `fused-kd demo` with its extras."""

import contextlib
import importlib
import io
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fused_kd
from fused_kd import backends, cli, demo, native
from fused_kd.demo import vocabulary
from fused_kd.demo.eager import eager_kd_loss
from fused_kd.reference import kd_loss

NO_LIBRARY = "no C++ compiler was found (tried g++); install one, such as g++, and reinstall"
# Ten epochs of training with rounding that differs: 1e-5 was seen, over five seeds.
BOUND = 1e-4
EXTRAS = ("sklearn", "matplotlib", "rich")


def no_progress(name: str, steps: int) -> range:
    return range(steps)


def skip_without_extras() -> None:
    for name in EXTRAS:
        pytest.importorskip(name)


class WithAWrongGradient(fused_kd.FusedKDLoss):
    """The right value; the gradient is off by one percent, in one of ten columns."""

    def forward(self, student_logits: Tensor, *others: Tensor) -> Tensor:
        factor = torch.ones(10)
        factor[4] = 1.01
        logits = student_logits.clone()
        logits.register_hook(lambda gradient: gradient * factor)
        return super().forward(logits, *others)


def info(capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["info"]) == 0
    return capsys.readouterr().out


class TestInfo:
    def test_versions_and_every_backend(self, capsys: pytest.CaptureFixture[str]) -> None:
        text = info(capsys)
        assert fused_kd.__version__ in text
        assert torch.__version__ in text
        for name, backend in backends.PREFERENCE.items():
            assert f"  {name:<8}{backend.DESCRIPTION}\n" in text

    def test_the_build_of_a_library(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        report = {"cpu": {"library": "x.so", "built": "some compiler 1.2", "flags": "-O9"}}
        monkeypatch.setattr(native, "build_report", lambda: report)
        monkeypatch.setattr(backends.cpu, "unavailable", lambda: None)
        text = info(capsys)
        assert "some compiler 1.2" in text
        assert "-O9" in text

    def test_a_missing_library_with_its_remedy(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.delenv(backends.VARIABLE, raising=False)
        monkeypatch.setattr(native, "build_report", lambda: {"cpu": {"missing": NO_LIBRARY}})
        monkeypatch.setattr(native, "load", lambda name: NO_LIBRARY)
        text = info(capsys)
        assert f"missing: {NO_LIBRARY}" in text
        assert "  cpu     torch for float32, bfloat16, float16, float64\n" in text

    def test_the_variable_is_shown_and_obeyed(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv(backends.VARIABLE, "torch")
        text = info(capsys)
        assert "FUSED_KD_BACKEND is set to 'torch'" in text
        assert "  cpu     torch for float32, bfloat16, float16, float64\n" in text

    def test_a_variable_that_names_no_backend(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv(backends.VARIABLE, "abacus")
        assert "FUSED_KD_BACKEND must be one of 'auto'" in info(capsys)

    def test_needs_no_extra_and_no_triton(self) -> None:
        hide = "".join(f"sys.modules[{name!r}] = None; " for name in (*EXTRAS, "triton"))
        code = f"import sys; {hide}from fused_kd.cli import main; sys.exit(main(['info']))"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        assert "triton    cannot be imported" in result.stdout


class TestArguments:
    def test_as_a_module(self) -> None:
        result = subprocess.run(
            [sys.executable, "-m", "fused_kd", "--version"], capture_output=True, text=True, check=False
        )
        assert result.stdout == f"fused_kd {fused_kd.__version__}\n"

    @pytest.mark.parametrize("arguments", [[], ["dance"], ["demo", "--rows", "1"], ["demo", "--rows", "many"]])
    def test_what_does_not_parse(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as error:
            cli.main(arguments)
        assert error.value.code == 2
        assert "usage: fused-kd" in capsys.readouterr().err

    def test_a_missing_extra_is_named_with_its_remedy(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "sklearn", None)
        assert cli.main(["demo"]) == 1
        message = capsys.readouterr().err
        assert "scikit-learn" in message
        assert "pip install 'fused_kd[demo]'" in message

    def test_an_output_that_cannot_be_written_is_refused_before_the_work(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        skip_without_extras()
        assert cli.main(["demo", "--output", str(tmp_path / "nowhere" / "x.png")]) == 1
        assert "--output" in capsys.readouterr().err


def test_eager_is_the_reference() -> None:
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64)
    labels = torch.randint(7, (5,))
    expected = kd_loss(student, teacher, labels, temperature=3.0, alpha=0.7)
    torch.testing.assert_close(eager_kd_loss(student, teacher, labels, temperature=3.0, alpha=0.7), expected)


class TestDemo:
    @pytest.fixture
    def unseen(self) -> ModuleType:
        pytest.importorskip("sklearn")
        return importlib.import_module("fused_kd.demo.unseen")

    def test_quick(self, tmp_path: Path) -> None:
        skip_without_extras()
        path = tmp_path / "picture.png"
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            assert cli.main(["demo", "--quick", "--output", str(path)]) == 0
        lines = output.getvalue().splitlines()
        assert len(lines) <= 32
        assert any(line.startswith("student, distilled") for line in lines)
        assert any(line.startswith("eager PyTorch") and "ms" in line for line in lines)
        assert lines[-1] == f"Picture: {path}"
        assert path.read_bytes().startswith(b"\x89PNG")

    def test_the_digits_show_what_the_demo_says(self, unseen: ModuleType) -> None:
        learned = unseen.run(demo.QUICK_EPOCHS, 0, no_progress)
        assert learned.hard.score.unseen_right == 0
        assert learned.fused.score.unseen_right >= learned.test_unseen // 4
        assert learned.fused.corrected.unseen_right > learned.fused.score.unseen_right
        assert learned.teacher.errors < learned.hard.score.errors
        assert learned.difference < BOUND

    def test_no_image_is_in_both_sets(self, unseen: ModuleType) -> None:
        train, test = unseen.load(0)
        assert len(train.labels) == 1000
        assert len(train.labels) + len(test.labels) == 1797
        assert 0 < (test.labels == unseen.UNSEEN).sum() < len(test.labels)

    @pytest.mark.parametrize(
        "wrong",
        [
            partial(fused_kd.FusedKDLoss, teacher_temperature=20.2),
            partial(fused_kd.FusedKDLoss, alpha=0.91),
            WithAWrongGradient,
        ],
    )
    def test_the_bound_on_the_curves_catches_a_loss_that_is_off_by_one_percent(
        self, wrong: Callable[..., object], unseen: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(unseen, "FusedKDLoss", wrong)
        assert unseen.run(5, 0, no_progress).difference > BOUND

    @pytest.mark.parametrize("softmax", [0.04, 0.07, 0.3, 0.9])
    def test_no_label_of_the_picture_runs_across_the_yardstick(self, softmax: float) -> None:
        skip_without_extras()
        report = importlib.import_module("fused_kd.demo.report")
        cost = vocabulary.Cost
        fused, eager = cost(0.05, 80_000_000), cost(1.0, 400_000_000)
        axes = importlib.import_module("matplotlib.figure").Figure(figsize=(6, 4.8)).subplots()
        report._bars(axes, vocabulary.Measured(128, "cpu", fused, eager, softmax, 0.0, 0.0))
        (yardstick,) = (line.get_window_extent() for line in axes.lines)
        labels = [text for text in axes.texts if "  " in text.get_text()]
        assert len(labels) == 4
        for label in labels:
            assert not yardstick.overlaps(label.get_window_extent()), label.get_text()

    def test_memory_is_the_gradient_for_fused_and_more_for_eager(self) -> None:
        measured = vocabulary.run(demo.FEWEST_ROWS, 0, no_progress)
        assert measured.loss_difference < 1e-5
        assert measured.gradient_difference < 1e-5
        if measured.fused.memory is None or measured.eager.memory is None:
            pytest.skip("memory is measured on Linux only")
        assert measured.eager.memory > 4 * measured.logits_bytes
        assert measured.fused.memory > 0.9 * measured.logits_bytes
        if measured.backend == "cpu":
            assert measured.fused.memory < 1.2 * measured.logits_bytes
