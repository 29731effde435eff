"""`fused-kd paper`: that its experiments are what they are called, and that its findings can say no."""

import contextlib
import importlib
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import fused_kd
from fused_kd import cli
from fused_kd.demo import findings

EXTRAS = ("sklearn", "matplotlib", "rich")


def no_progress(name: str, steps: int) -> range:
    return range(steps)


def around(mean: float, *, seeds: int = 8) -> Tensor:
    """Values with this mean and a standard error of 0.1."""
    values = torch.linspace(-1, 1, seeds)
    return mean + values / values.std() * 0.1 * seeds**0.5


@pytest.fixture
def paper() -> ModuleType:
    pytest.importorskip("sklearn")
    return importlib.import_module("fused_kd.demo.paper")


class TestCommand:
    def test_quick(self, tmp_path: Path) -> None:
        for name in EXTRAS:
            pytest.importorskip(name)
        path = tmp_path / "picture.png"
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            assert cli.main(["paper", "--quick", "--output", str(path)]) == 0
        text = output.getvalue()
        assert "…" not in text  # no cell is cut at the width of a pipe
        for figure in ("0.67", "1.46", "0.74", "2.06", "1.09", "47.3", "13.2", "+3.5", "-7.6", "58.9", "44.5", "57.0"):
            assert f" {figure}" in text
        lines = text.splitlines()
        assert lines[-1] == f"Picture: {path}"
        # In so short a time nothing is learned: the output says so.
        summary = lines[lines.index("What does not reproduce on these digits, or is undecided") + 1 : -2]
        assert any(line.startswith("does not hold") and "soft targets make fewer errors" in line for line in summary)
        assert path.read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize("seeds", ["1", "-3", "2.5", "many"])
    def test_too_few_seeds(self, seeds: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as error:
            cli.main(["paper", "--seeds", seeds])
        assert error.value.code == 2
        message = capsys.readouterr().err
        assert "argument --seeds: must be" in message
        assert seeds in message

    def test_a_missing_extra_is_named_with_its_remedy(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "sklearn", None)
        assert cli.main(["paper"]) == 1
        message = capsys.readouterr().err
        assert message.startswith("fused-kd paper: needs scikit-learn")
        assert "pip install 'fused_kd[demo]'" in message

    def test_an_output_that_cannot_be_written_is_refused_before_the_work(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name in EXTRAS:
            pytest.importorskip(name)
        assert cli.main(["paper", "--output", str(tmp_path)]) == 1
        assert "fused-kd paper: --output" in capsys.readouterr().err


class TestFindings:
    @pytest.mark.parametrize(("mean", "holds"), [(5.4, True), (5.2, None), (5.0, None), (4.8, None), (4.6, False)])
    def test_above(self, mean: float, holds: bool | None) -> None:
        finding = findings.above("claim", around(mean), 5.0, "units")
        assert finding.holds is holds
        assert finding.because == f"{mean:.1f} ± 0.1 units"

    def test_fewer_compares_seed_by_seed(self) -> None:
        scattered = torch.linspace(0, 50, 8)
        assert findings.fewer("claim", scattered + around(0.4), scattered).holds is True
        assert findings.fewer("claim", scattered, scattered + around(0.4)).holds is False

    def test_no_difference_at_all_is_not_told(self) -> None:
        assert findings.fewer("claim", torch.ones(3), torch.ones(3)).holds is None

    @pytest.mark.parametrize(("apart", "holds"), [(0.2, True), (0.4, False)])
    def test_alike(self, apart: float, holds: bool) -> None:
        # The seeds' deviation is 0.1 * sqrt(8) = 0.28.
        assert findings.alike("claim", around(1.0), around(1.0 + apart)).holds is holds


class TestExperiments:
    def test_ensembles_are_the_means_of_distributions(self, paper: ModuleType) -> None:
        logits = 6 * torch.randn(3, 4, 5, 10, dtype=torch.float64)
        p = (logits / 2.5).softmax(-1)
        geometric = p.log().mean(0).exp()
        for ensemble, expected in (
            ("arithmetic", p.mean(0)),
            ("geometric", geometric / geometric.sum(-1, keepdim=True)),
        ):
            torch.testing.assert_close((paper.combined(logits, 2.5, ensemble) / 2.5).softmax(-1), expected)

    def test_first_images_to_keep(self, paper: ModuleType) -> None:
        kept = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 0, 1]]).bool()
        assert paper.first(kept).tolist() == [[1, 2], [0, 4]]

    def test_every_seed_learns_from_its_own_teacher_and_transfer_set(
        self, paper: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        school = paper._school(paper.Course(1, 0, no_progress), 2)
        seen = []

        def students(name: str, loss: Callable[..., Tensor], sets: object, targets: Tensor, *others: object) -> object:
            seen.append((sets, targets, others))
            return None, []

        monkeypatch.setattr(paper, "students", students)
        kept = school.train.labels == 7
        school.student("", fused_kd.FusedKDLoss(), transfer=paper.first(kept))
        ((sets, targets, (_, course)),) = seen
        assert (sets.labels == 7).all()
        steps = course.epochs * -(-sets.labels.shape[1] // paper.BATCH)
        assert steps == 20  # as with all images
        for seed in range(2):
            rows = kept[seed].nonzero()[: sets.labels.shape[1], 0]
            assert sets.images[seed].equal(school.train.images[seed, rows])
            torch.testing.assert_close(targets[seed], school.teachers_train[:, seed, rows].mean(0))

    def test_a_teacher_knows_what_its_seed_teaches(self, paper: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        load = paper.load

        def all_the_same(seed: int) -> object:
            return [digits._replace(labels=torch.full_like(digits.labels, seed)) for digits in load(seed)]

        monkeypatch.setattr(paper, "load", all_the_same)
        school = paper._school(paper.Course(1, 4, no_progress), 3)
        for seed in range(3):
            assert (school.teachers_train[:, seed].argmax(-1) == 4 + seed).all()
            assert (school.teachers_test[:, seed].argmax(-1) == 4 + seed).all()

    def test_the_correction_of_two_classes_is_one_number(self, paper: ModuleType) -> None:
        labels = torch.arange(1000) % 10
        logits = torch.nn.functional.one_hot(labels, 10) * 4.0
        logits[:, 7:9] += 9.0  # right again with any number from -9 - 4 to -9 + 4
        found = paper.correction(logits, labels, (7, 8))
        assert found.count_nonzero() == 2
        torch.testing.assert_close(found[7:9], torch.tensor([-9.0, -9.0]), rtol=0, atol=0.15)

    def test_a_students_targets_and_labels_are_those_of_its_images(self, paper: ModuleType) -> None:
        digits = importlib.import_module("fused_kd.demo.digits")
        pairs = [digits.load(seed)[0] for seed in range(2)]
        sets = digits.Digits(torch.stack([d.images for d in pairs]), torch.stack([d.labels for d in pairs]))
        scale = torch.tensor([1.0, 2.0])  # tells the seeds apart
        targets = torch.nn.functional.one_hot(sets.labels, 10) * scale[:, None, None]
        seen = []

        def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
            seen.append((teacher.argmax(-1) == labels).all() and teacher.amax(-1).equal(scale.repeat_interleave(50)))
            return torch.nn.functional.cross_entropy(student, labels)

        digits.students("", loss, sets, targets, 8, paper.Course(1, 0, no_progress))
        assert len(seen) == 20
        assert all(seen)

    def test_the_gradient_of_kl_goes_to_that_of_logit_mse(self, paper: ModuleType) -> None:
        student, teacher = 6 * torch.randn(2, 3, 50, 10)
        limit = paper._gradient(fused_kd.FusedKDLoss(1.0, alpha=1.0, divergence="logit_mse"), student, teacher)
        kl = paper._gradient(fused_kd.FusedKDLoss(1000.0, alpha=1.0), student, teacher)
        assert (kl - limit).norm() / limit.norm() < 0.02

    def test_the_teacher_moves_images_by_part_of_a_pixel(self, paper: ModuleType) -> None:
        digits = importlib.import_module("fused_kd.demo.digits")
        image = torch.zeros(8, 8)
        image[3, 4] = 1.0
        moved = digits._moved(image.flatten()[None], 0.5).view(9, 8, 8)
        torch.testing.assert_close(moved[4], image)
        expected = torch.zeros(8, 8)
        expected[3:5, 4:6] = 0.25
        torch.testing.assert_close(moved[0], expected)
        whole = digits._moved(image.flatten()[None], 1.0).view(9, 8, 8)
        assert whole[0, 4, 5] == 1
        assert whole[0].sum() == 1
