"""The code in README.md and docs/migrate.md runs, and what a diff adds computes what it removes."""

import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import make_labels, make_logits

import fused_kd
from fused_kd import FusedKDLoss, FusedLinearKDLoss, SparseTeacher, presets
from fused_kd.divergences import JSD

ROOT = Path(__file__).parent.parent
OTHERS = {
    "lightning": "lightning",
    "liger_kernel": "liger-kernel",
    "torchdistill": "torchdistill",
    "torchvision": "torchvision",
    "transformers": "'fused_kd[huggingface]'",
    "trl": "'fused_kd[trl]'",
}
# Blocks that round to float32 on their way (README, Liger); the others agree to 1e-15.
BOUND = 1e-6


def blocks(language: str) -> list[Any]:
    found = []
    for file in (ROOT / "README.md", ROOT / "docs" / "migrate.md"):
        text = file.read_text()
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start()) + 1
            found.append(pytest.param(match[1], id=f"{file.name}:{line}"))
    return found


@pytest.fixture
def names(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What the blocks take for granted: see the head of docs/migrate.md."""
    batch, length, vocabulary, width = 3, 7, 301, 16
    s, t = (x.double() for x in make_logits("wide", batch * length, vocabulary))
    y = make_labels(batch * length, vocabulary=vocabulary, ignored=0.0)
    student_logits, teacher_logits = (x.double() for x in make_logits("wide", batch, length, vocabulary))
    labels = make_labels(batch, length, vocabulary=vocabulary)
    attention_mask = (labels != -100).long()
    attention_mask[0] = 1
    generator = torch.Generator().manual_seed(0)
    shapes = {"student_hidden": (batch * length, width), "student_weight": (vocabulary, width)}
    shapes |= {name.replace("student", "teacher"): shape for name, shape in shapes.items()}
    hidden = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    top = SparseTeacher.from_logits(t, 8, 2.0)

    def model(logits: torch.Tensor, states: torch.Tensor, weight: torch.Tensor) -> Any:
        states = states.unflatten(0, (batch, length))
        inner = lambda ids: SimpleNamespace(last_hidden_state=states)  # noqa: E731
        head = SimpleNamespace(weight=weight)

        class Model:
            model, lm_head = staticmethod(inner), head

            def __call__(self, ids: torch.Tensor) -> Any:
                return SimpleNamespace(logits=logits)

        return Model()

    for leaf in (s, student_logits, hidden["student_hidden"], hidden["student_weight"]):
        leaf.requires_grad_()
    given = {
        **{"torch": torch, "F": F, "fused_kd": fused_kd, "presets": presets, "JSD": JSD},
        **{x.__name__: x for x in (FusedKDLoss, FusedLinearKDLoss, SparseTeacher)},
        **{"T": 2.0, "alpha": 0.9, "kd_ratio": 0.4, "alpha_ce": 0.6, "alpha_mlm": 0.4, "V": vocabulary},
        **{"s": s, "t": t, "y": y, "s_slice": s, "t_slice": t, **hidden},
        "gather_from_tensor_model_parallel_region": lambda x: x,  # of one process
        **{"student_logits": student_logits, "teacher_logits": teacher_logits, "labels": labels},
        **{"labels_of_the_step": 41, "attention_mask": attention_mask, "input_ids": labels.clamp(min=0)},
        **{"outputs": t + 1, "targets": F.one_hot(y, vocabulary).double(), "criterion": F.cross_entropy},
        **{"ids": top.ids, "log_p": top.log_probs, "log_probs": top.log_probs, "main": lambda: None},
        "student": model(student_logits, hidden["student_hidden"], hidden["student_weight"]),
        "teacher": model(teacher_logits, hidden["teacher_hidden"], hidden["teacher_weight"]),
    }
    given |= {"teacher_1": teacher_logits, "teacher_2": teacher_logits + 1, "tmp_path": tmp_path}
    yield given
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(code: str, names: dict[str, Any]) -> dict[str, Any]:
    names = dict(names)
    if "process_group" in code:
        if not torch.distributed.is_initialized():
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        names["group"] = torch.distributed.group.WORLD
    for package, install in OTHERS.items():
        if package in code:
            pytest.importorskip(package, reason=f"the block needs {package}; pip install {install}")
            names[package] = __import__(package)
    if "Trainer(" in code:
        trainers = pytest.importorskip("test_integrations", reason="pip install 'fused_kd[huggingface]'")
        names |= {
            "Trainer": trainers.transformers.Trainer,
            "model": trainers.llama(16, 1),
            "teacher": trainers.llama(24, 2),
            "args": trainers.arguments(names["tmp_path"], max_steps=1),
            "data": trainers.examples(8),
            "collate": trainers.collated,
        }
    exec(compile(code, "block", "exec"), names)
    if "trainer" in names:
        names["trainer"].train()
    return names


@pytest.mark.parametrize("block", blocks("python"))
def test_python(block: str, names: dict[str, Any]) -> None:
    if "loss_fn" in block and "loss_fn =" not in block:  # of kinds of teachers, of a language model
        names["loss_fn"] = FusedKDLoss(2.0)
        names |= {name: names[name].unflatten(0, names["labels"].shape) for name in ("ids", "log_probs")}
    run(block, names)


@pytest.mark.parametrize("block", blocks("diff"))
def test_diff(block: str, names: dict[str, Any]) -> None:
    before, after = (
        "".join(line[1:] or "\n" for line in block.splitlines(keepends=True) if line[0] in kept)
        for kept in ("- \n", "+ \n")
    )
    assert before != after
    leaves = [x for x in names.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    found = []
    for code in (before, after):
        loss = run(code, names).get("loss")
        if loss is not None:
            if "loss.backward()" not in code:
                loss.backward()
            gradients = [x.grad for x in leaves if x.grad is not None]
            found.append((float(loss.detach()), torch.cat([x.flatten() for x in gradients])))
            for leaf in leaves:
                leaf.grad = None
    assert len(found) in (0, 2)
    if found:
        (theirs, expected), (ours, gradient) = found
        assert ours == pytest.approx(theirs, rel=BOUND)
        assert (gradient - expected).norm() <= BOUND * expected.norm()
        print("distances", abs(ours / theirs - 1), float((gradient - expected).norm() / expected.norm()))


@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml(block: str) -> None:
    """A component can be made with the arguments beneath it; a key is that of the recipe."""
    yaml = pytest.importorskip("yaml", reason="needs yaml; pip install pyyaml")
    for name, node in yaml.safe_load(block).items():
        if isinstance(node, dict) and "_component_" in node:
            component = pkgutil.resolve_name(node.pop("_component_"))
            component(**node)
        elif isinstance(node, dict):
            recipe = (ROOT / "examples" / "recipes" / "torchdistill_config.py").read_text()
            assert f"class {node['key']}(" in recipe, name
            assert all(f"        {argument}: " in recipe for argument in node["kwargs"])


def test_names() -> None:
    """All that the pages call by `fused_kd.`, `presets.` and `divergence=` exists."""
    for file in ("README.md", "docs/migrate.md"):
        text = (ROOT / file).read_text()
        for name in set(re.findall(r"\b((?:fused_kd|presets)(?:\.[A-Za-z_]+)+)", text)):
            if name.startswith("fused_kd.integrations."):  # which needs what it integrates with
                assert (ROOT / name.replace(".", "/")).with_suffix(".py").is_file(), name
            else:
                pkgutil.resolve_name(name if name.startswith("fused_kd") else f"fused_kd.{name}")
        for name in set(re.findall(r'divergence="(\w+)"', text)):
            FusedKDLoss(divergence=name)


def test_every_preset_has_its_section() -> None:
    text = (ROOT / "docs" / "migrate.md").read_text() + (ROOT / "README.md").read_text()
    for name, value in vars(presets).items():
        if inspect.isfunction(value) and not name.startswith("_"):
            assert name in text, name
