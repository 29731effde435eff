"""benchmarks/gpu_report.py without a GPU: each stage fails alone and says why, and what it prints can be read."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from argparse import Namespace
from collections import deque
from pathlib import Path
from typing import Any

import gpu_report
import gpu_smoke
import gpu_table
import gpu_time
import pytest
import stages
import timing
import torch
from contenders import COPY, SHAPES, Contender, of_backend, of_others
from gpu_counters import read
from linear_contenders import LINEAR_SHAPES, of_linear
from records import Record, emit, parsed
from stages import Command, Runner, Stage, last_word
from support import BACKENDS, GPU_BACKENDS

from fused_kd import ops


def python(code: str, label: str = "it") -> Command:
    return Command(label, (sys.executable, "-c", code))


def ran(folder: Path, *commands: Command, limit: float = 60.0, minutes: float = 1.0) -> list[Record]:
    """The records of a stage of these commands, followed by another."""
    environment = {**os.environ, "PYTHONPATH": str(gpu_report.HERE)}
    runner = Runner(folder, time.monotonic() + 60 * minutes, folder, environment)
    runner.run(Stage("first", limit, "first.log", commands))
    runner.run(Stage("second", 60.0, "second.log", (python("print('here')", "second"),)))
    written = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert written == runner.records
    return runner.records


def outcome(records: list[Record], command: str) -> tuple[str, str]:
    (record,) = [r for r in records if r["record"] == "outcome" and r["command"] == command]
    return record["status"], record["why"]


class TestStages:
    def test_a_command_that_fails_leaves_the_others(self, tmp_path: Path) -> None:
        crash = python("import os, signal; print('so far', flush=True); os.kill(os.getpid(), signal.SIGSEGV)", "crash")
        error, good = python("raise ValueError('no\\nmore')", "error"), python("print('done')", "good")
        records = ran(tmp_path, crash, error, good)
        assert outcome(records, "crash") == ("failed", "SIGSEGV; last: so far")
        assert outcome(records, "error") == ("failed", "ValueError: no")
        assert outcome(records, "good") == ("passed", "done")
        assert outcome(records, "second") == ("passed", "here")
        assert "crash| so far\n" in (tmp_path / "first.log").read_text()

    def test_a_command_that_hangs_is_stopped_with_its_children(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stages, "LEAST", 0.0)
        mark = tmp_path / "mark"
        child = f"import time, pathlib; time.sleep(6); pathlib.Path({str(mark)!r}).touch()"
        code = (
            "import subprocess, sys, time; from records import emit; emit('time', n=1); "
            f"subprocess.Popen([sys.executable, '-c', {child!r}]); print('waiting', flush=True); time.sleep(600)"
        )
        begin = time.monotonic()
        records = ran(tmp_path, python(code, "hang"), python("print('done')", "good"), limit=4.0)
        assert time.monotonic() - begin < 30
        assert outcome(records, "hang") == ("stopped", "at its limit of 4 s; last: waiting")
        assert outcome(records, "good") == ("passed", "done")
        assert outcome(records, "second") == ("passed", "here")
        assert {"record": "time", "n": 1, "stage": "first"} in records  # what it said before is kept
        time.sleep(max(0.0, begin + 9 - time.monotonic()))
        assert not mark.exists()

    def test_a_tool_that_is_missing(self, tmp_path: Path) -> None:
        commands = Command("known", ("none",), missing="ncu is missing"), Command("unknown", ("/no/such/tool",))
        records = ran(tmp_path, *commands)
        assert outcome(records, "known") == ("failed", "ncu is missing")
        assert "No such file" in outcome(records, "unknown")[1]
        assert outcome(records, "second")[0] == "passed"

    def test_no_stage_begins_after_the_deadline(self, tmp_path: Path) -> None:
        assert outcome(ran(tmp_path, python("print(1)"), minutes=0.0), "second") == ("not run", "no time was left")

    def test_a_log_is_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stages, "LOG_LIMIT", 1000)
        ran(tmp_path, python("for _ in range(1000): print('a' * 100)"))
        assert (tmp_path / "first.log").stat().st_size < 1200

    def test_the_last_word_is_the_error(self) -> None:
        lines = ["Traceback", "torch.AcceleratorError: CUDA error: an illegal access", "Device-side assertions", ""]
        assert last_word(deque(lines)) == "torch.AcceleratorError: CUDA error: an illegal access"
        assert last_word(deque(["========= ERROR SUMMARY: 0 errors", '{"record": "time"}'])).endswith("0 errors")


def test_records_are_found_behind_a_progress_dot(capsys: pytest.CaptureFixture[str]) -> None:
    emit("time", share=float("nan"), name="a b")
    line = capsys.readouterr().out
    record = parsed("..s" + line)
    assert record is not None
    assert record["name"] == "a b"
    assert record["share"] != record["share"]
    assert parsed(line[:20]) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_each_stage_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--output", str(tmp_path), "--only", "build,smoke,time,sanitizer,counters"]
    monkeypatch.setattr(gpu_report, "tool", lambda name: None)
    monkeypatch.setattr(gpu_report, "SMOKE_DTYPES", ("float32",))
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", *arguments, "--smoke-shapes", "4x100"])
    assert gpu_report.main() == 1
    printed = capfd.readouterr().out
    report = printed.split("=== report\n")[1]
    assert report.strip() == (tmp_path / "table.txt").read_text().strip()
    assert report.count("no GPU: PyTorch") == 6  # build, smoke, and four runs of time
    assert report.count("compute-sanitizer is missing") == 1
    assert report.count("ncu is missing") == 2
    assert "passed" not in report


@pytest.mark.skipif("cpu" not in BACKENDS, reason="no library for the CPU")
def test_correctness_and_time_on_the_cpu(tmp_path: Path) -> None:
    options = Namespace(
        device="cpu", shapes="4x300,2x50", linear_shapes="6x8x50", smoke_shapes="4x300,3x300", only="smoke,time"
    )
    runner = Runner(tmp_path, time.monotonic() + 300, gpu_report.ROOT, gpu_report.environment())
    for stage in gpu_report.stages(options):
        if stage.name != "time others":  # where torch.compile takes its time
            runner.run(stage)
    smoke = gpu_table.of_kind(runner.records, "smoke")
    assert len(smoke) == 2 * 3 * 5  # shapes, dtypes, verbs
    assert all(0 <= record["share"] <= 1 and record["same"] for record in smoke)
    times = gpu_table.of_kind(runner.records, "time")
    assert len(times) == 2 * 2 * 6  # dtypes, shapes, contenders
    assert {record["of_copy"] for record in times if record["contender"] == COPY} == {1.0}
    assert all(record["median"] >= record["fastest"] > 0 for record in times)
    assert {record["peak_of_logits"] for record in times if record["contender"] == "cpu backward"} == {1.0}
    assert {r["status"] for r in gpu_table.of_kind(runner.records, "outcome")} == {"passed"}


def test_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One column of one row off by a percent; and a verb that raises. The other verbs pass."""
    right = ops.rows_fused

    def wrong(*arguments: Any) -> Any:
        soft, hard, gradient = right(*arguments)
        gradient[1, gradient[1].abs().argmax()] *= 1.01
        return soft, hard, gradient

    def raising(*arguments: Any) -> Any:
        raise RuntimeError("CUDA error: out of luck\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(ops, "rows_fused", wrong)
    monkeypatch.setattr(ops, "rows_backward_", raising)
    arguments = ["--device", "cpu", "--backend", "torch", "--dtype", "float32", "--shapes", "4x300"]
    monkeypatch.setattr(sys, "argv", ["gpu_smoke.py", *arguments])
    with pytest.raises(SystemExit, match="wrong: 4x300 inplace, 4x300 fused verb"):
        gpu_smoke.main()
    torch.set_default_device(None)
    records = [parsed(line) for line in capsys.readouterr().out.splitlines()]
    by_verb = {record["verb"]: record for record in records if record is not None}
    assert by_verb["inplace"]["error"] == "RuntimeError: CUDA error: out of luck"
    assert by_verb["fused verb"]["share"] > 1
    assert max(by_verb[verb]["share"] for verb in ("forward", "backward", "loss")) <= 1
    # ... and stand in the table.
    text = "\n".join(gpu_table.smoke([{**record, "stage": "smoke"} for record in by_verb.values()], 10))
    assert "torch float32 4x300 inplace: RuntimeError: CUDA error: out of luck" in text
    assert "of the bound" in text.splitlines()[-1]


def test_out_of_memory_is_said_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(inputs: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    def broken(inputs: Any) -> Any:
        raise RuntimeError("not today")

    add = of_others("cpu")["floor: add(s, t, out=g)"]
    contenders = {"full": Contender(full), "broken": Contender(broken), "add": add}
    monkeypatch.setattr(gpu_time, "of_others", lambda device: contenders)
    monkeypatch.setattr(
        sys, "argv", ["", "--device", "cpu", "--run", "others", "--shapes", "3x40", "--dtypes", "bfloat16"]
    )
    with pytest.raises(SystemExit, match="failed: 3x40 bfloat16 broken"):
        gpu_time.main()
    records = [record for line in capsys.readouterr().out.splitlines() if (record := parsed(line)) is not None]
    assert [record.get("error") for record in records] == [None, "out of memory", "RuntimeError: not today", None]
    text = "\n".join(gpu_table.times(records, 10))
    assert text.count("no memory") == 1
    assert "broken bfloat16 3x40: RuntimeError: not today" in text


class TestTable:
    """Of made-up records, as many as a run has."""

    def records(self, failing: bool) -> list[Record]:
        shapes, dtypes = SHAPES["cuda"].split(","), ("bfloat16", "float32")
        result: list[Record] = [{"record": "machine", "name": "NVIDIA H100 80GB HBM3", "memory": 85 * 10**9}]
        why = "RuntimeError: " + "something long went wrong " * 8
        verbs = ("forward", "backward", "inplace", "fused verb", "loss")
        checked = gpu_report.SMOKE_SHAPES.split(",")
        smoke = itertools.product(("triton", "cuda"), gpu_report.SMOKE_DTYPES, checked, verbs)
        for case in smoke:
            about = {"record": "smoke", "stage": "smoke", **dict(zip(gpu_table.ABOUT, case, strict=True))}
            result.append({**about, "error": why} if failing else {**about, "share": 0.5, "same": True})
        figures = {
            "median": 12.345e-3,
            "fastest": 12e-3,
            "host": 1e-4,
            "bytes_per_second": 2.9e12,
            "of_copy": 0.95,
            "peak_of_logits": 12.0,
        }
        runs = {run: [COPY, *(run + kind for kind in of_backend(run, ""))] for run in ("triton", "cuda")}
        runs["others"] = [COPY, *of_others("cpu")]
        for run, contenders in runs.items():
            for dtype, shape, contender in itertools.product(dtypes, shapes, contenders):
                about = {"record": "time", "run": run, "dtype": dtype, "shape": shape, "contender": contender}
                result.append({**about, "error": why} if failing else {**about, **figures})
        for shape, contender in itertools.product(LINEAR_SHAPES["cuda"].split(","), of_linear()):
            about = {"record": "linear", "run": "linear", "dtype": "bfloat16", "shape": shape, "contender": contender}
            result.append({**about, "error": why} if failing else {**about, **figures, "of_copy": None})
        for i in range(1500):
            what = "failed" if failing or i < 40 else "passed"
            result.append(
                {"record": "test", "test": f"tests/test_x.py::test[{i}]", "outcome": what, "why": f"{i % 20}: {why}"}
            )
        stalls = {"long_scoreboard": 5.123, "wait": 1.0, "math_pipe_throttle": 0.5}
        for backend, verb in itertools.product(("triton", "cuda"), ("forward", "forward", "backward", "fused verb")):
            about = {"backend": backend, "verb": verb, "kernel": "rows_kernel", "shape": "1x2", "dtype": "bfloat16"}
            result.append({"record": "counters", **about, "nanoseconds": 1e6, "stalls": stalls})
        for stage in gpu_report.stages(
            Namespace(device="cuda", shapes=None, linear_shapes=None, smoke_shapes=gpu_report.SMOKE_SHAPES, only="")
        ):
            for command in stage.commands:
                about = {"stage": stage.name, "command": command.label, "seconds": 12.3}
                status, last = ("failed", command.label + why) if failing else ("passed", "SUMMARY: 0 errors")
                result.append({"record": "outcome", **about, "status": status, "why": last})
        return result

    @pytest.mark.parametrize("failing", [False, True])
    def test_it_fits_and_tells_everything(self, failing: bool) -> None:
        text = gpu_table.table(self.records(failing))
        assert len(text.splitlines()) <= 100
        assert len(text) <= 12_000
        for word in ("H100", "smoke", "time triton", "correctness", "bfloat16: ms", "float32: ms", "tests marked gpu"):
            assert word in text
        assert "counters of" in text
        assert "long_scoreboard 5.1" in text
        if failing:
            assert "1500 failed" in text
        else:
            assert "40 failed, 1460 passed" in text
            assert "2 x 0: RuntimeError" in text
            assert ": test_x.py::test[0], test_x.py::test[20]" in text
            assert "12.345 2900   95% 12.00" in text
            assert text.count("eager") >= 2
            assert "0.50" in text
            assert text.count("SUMMARY: 0 errors") == 1

    def test_a_share_that_is_no_number_is_worst(self) -> None:
        rows = [{"verb": "loss", "share": share, "same": True} for share in (0.1, float("nan"), 0.2)]
        assert gpu_table.worst(rows, "loss", 3) == "nan"
        assert gpu_table.worst(rows[:1], "loss", 3) == "0.10?"  # not all of them ran
        assert gpu_table.worst([{**rows[0], "same": False}], "loss", 1) == "0.10!"

    def test_a_record_of_another_form_costs_its_section_only(self) -> None:
        text = gpu_table.table([*self.records(False), {"record": "smoke", "stage": "smoke"}])
        assert "smoke: cannot be shown" in text
        assert "float32: ms" in text


class Event:
    """A CUDA event on a device whose time passes only in `spend`."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.now

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def test_a_round_is_timed_by_events_and_made_ready_outside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def spend(what: str, milliseconds: float) -> None:
        done.append(what)
        Event.now += milliseconds

    durations = iter([1000.0, 1000.0, 5.0, 1.0, 3.0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda clocks: spend("head start", 70.0))
    monkeypatch.setattr(timing, "_other_data", lambda: Namespace(max=lambda: spend("other data", 70.0)))
    times = timing.measure(lambda: spend("work", next(durations)), "cuda", 3, warmup=2)
    assert times.median == pytest.approx(3e-3)
    assert times.fastest == pytest.approx(1e-3)
    assert done == ["other data", "head start", "work"] * 5


def test_time_on_the_cpu_is_the_clocks() -> None:
    times = timing.measure(lambda: time.sleep(0.02), "cpu", 3, warmup=1)
    assert 0.02 <= times.fastest <= times.median < 0.2


def test_what_ncu_prints_is_read() -> None:
    names = [
        "ID",
        "Kernel Name",
        "gpu__time_duration.sum",
        "dram__bytes.sum.per_second",
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
        "sm__inst_issued.avg.pct_of_peak_sustained_active",
        "launch__registers_per_thread",
        "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
        "smsp__average_warps_issue_stalled_selected_per_issue_active.ratio",
        "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio",
    ]
    rows = [
        ["0", "forward", "1,000,000", "2.5e12", "81.5", "60", "80", "3.5", "1", "4.5"],
        ["1", "finish", "2000", "1e11", "n/a", "6", "40", "1", "1", "1"],
        ["2", "void fused_kd::rows_kernel<fused_kd::Variant<int>>(fused_kd::Work)", *"31111111"],
    ]
    lines = [",".join(f'"{value}"' for value in row) for row in (names, ["" for _ in names], *rows)]
    forward, finish, backward = read("\n".join(["==PROF== Connected to process 1", *lines, "==PROF== Disconnected"]))
    assert (forward["verb"], finish["verb"], backward["verb"]) == ("forward", "forward", "backward")
    assert forward["nanoseconds"] == 1e6
    assert forward["dram_percent"] == 81.5
    assert forward["issue_percent"] == 60
    assert forward["stalls"] == {"wait": 4.5, "long_scoreboard": 3.5}
    assert finish["dram_percent"] != finish["dram_percent"]  # not a number
    assert backward["kernel"] == "rows_kernel"
    assert list(read("==ERROR== ERR_NVGPUCTRPERM")) == []


def test_each_gpu_backend_has_its_runs() -> None:
    assert set(gpu_report.BACKENDS["cuda"]) == set(GPU_BACKENDS) - {"torch"}
