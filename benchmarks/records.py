"""What the programs of a GPU report say: one JSON object a line on standard output, as soon as it is known."""

from __future__ import annotations

import json
from typing import Any

Record = dict[str, Any]

_BEGIN = '{"record": '


def emit(kind: str, **fields: Any) -> None:
    print(json.dumps({"record": kind, **fields}), flush=True)


def parsed(line: str) -> Record | None:
    """The record in a line of output, if it has one; pytest's dots may stand before it."""
    begin = line.find(_BEGIN)
    if begin < 0:
        return None
    try:
        record: Record = json.loads(line[begin:])
    except ValueError:  # cut off, or mixed with what another thread wrote
        return None
    return record
