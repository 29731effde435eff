"""Runs the stages of a report: each command is a process of its own, with a limit, and none can end the others.

A stage's commands run side by side. Their output goes to the stage's log, and the records in it (records.py) to
results.jsonl too, each when it comes: whatever happens later, they are there.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from records import Record, parsed

LOG_LIMIT = 4 << 20  # characters of one stage
LEAST = 5.0  # seconds without which a stage need not begin
# How Python names what ended a program; its message may go on for lines.
ERROR = re.compile(r"(?:[a-z_]+\.)*[A-Z]\w*(?:Error|Exception|Interrupt): ")


@dataclass(frozen=True)
class Command:
    label: str
    arguments: tuple[str, ...]
    missing: str | None = None  # why it cannot be run here


@dataclass(frozen=True)
class Stage:
    name: str
    limit: float  # seconds
    log: str
    commands: tuple[Command, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


class Process:
    """A running command; `on_line` gets what it says."""

    def __init__(self, command: Command, folder: Path, environment: Mapping[str, str], on_line: Callable[[str], None]):
        self.begin = self.end = time.monotonic()
        self.tail: deque[str] = deque(maxlen=200)
        self.process = subprocess.Popen(
            command.arguments,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a group of its own, that ends with it
        )
        self._reader = threading.Thread(target=self._read, args=(on_line,), daemon=True)
        self._reader.start()

    def _read(self, on_line: Callable[[str], None]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.tail.append(line.rstrip("\n"))
            on_line(self.tail[-1])
        self.end = time.monotonic()

    def ended(self, until: float) -> tuple[str, str]:
        """How it ended, by `until` at the latest, and why in a line."""
        try:
            code = self.process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            code = None
        self._reader.join(5)  # what the command left running may hold the pipe
        self.end = max(self.end, self.begin) if not self._reader.is_alive() else time.monotonic()
        why = last_word(self.tail)
        if code is None:
            return "stopped", f"at its limit of {until - self.begin:.0f} s; last: {why}"
        if code < 0:
            return "failed", f"{signal.Signals(-code).name}; last: {why}"
        return ("failed" if code else "passed"), why

    def kill(self) -> None:
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may not let go of it
                self.process.wait(10)


def last_word(lines: deque[str]) -> str:
    """The last error, or else the last line that is no record."""
    said = [line.strip() for line in lines if line.strip() and parsed(line) is None]
    errors = [line for line in said if ERROR.match(line)]
    return (errors or said or ["it said nothing"])[-1][:200]


class Runner:
    """Runs stages until a deadline (of time.monotonic), and has the records so far."""

    def __init__(self, output: Path, deadline: float, folder: Path, environment: Mapping[str, str]) -> None:
        self.output, self.deadline = output, deadline
        self.folder, self.environment = folder, environment
        self.records: list[Record] = []
        self._lock = threading.Lock()

    def add(self, record: Record) -> None:
        with self._lock, (self.output / "results.jsonl").open("a") as file:
            self.records.append(record)
            file.write(json.dumps(record) + "\n")

    def run(self, stage: Stage) -> None:
        begin = time.monotonic()
        until = min(begin + stage.limit, self.deadline)
        running: dict[Command, Process] = {}
        try:
            for command in stage.commands:
                if until - begin < LEAST:
                    self._outcome(stage, command, 0.0, "not run", "no time was left")
                elif command.missing is not None:
                    self._outcome(stage, command, 0.0, "failed", command.missing)
                elif (process := self._started(stage, command)) is not None:
                    running[command] = process
            for command, process in running.items():
                status, why = process.ended(until)
                self._outcome(stage, command, process.end - process.begin, status, why)
        finally:
            for process in running.values():
                process.kill()

    def _started(self, stage: Stage, command: Command) -> Process | None:
        environment = {**self.environment, **stage.environment}
        try:
            return Process(command, self.folder, environment, self._listener(stage, command))
        except OSError as error:
            self._outcome(stage, command, 0.0, "failed", str(error))
            return None

    def _outcome(self, stage: Stage, command: Command, seconds: float, status: str, why: str) -> None:
        about = {"stage": stage.name, "command": command.label, "seconds": round(seconds, 1)}
        self.add({"record": "outcome", **about, "status": status, "why": why})

    def _listener(self, stage: Stage, command: Command) -> Callable[[str], None]:
        path = self.output / stage.log

        def listen(line: str) -> None:
            with self._lock, path.open("a") as log:
                if log.tell() < LOG_LIMIT:
                    log.write(f"{command.label}| {line}\n")
            record = parsed(line)
            if record is not None:
                self.add({**record, "stage": stage.name})

        return listen
