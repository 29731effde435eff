"""What the programs of a GPU report do where there is no GPU, or where they lost it."""

from __future__ import annotations

import traceback

import torch


def require(device: str) -> None:
    """Ends the program with one line where PyTorch has no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"no GPU: PyTorch {torch.__version__} finds none (torch.cuda.is_available() is False)")


def failed(error: Exception, device: str) -> str:
    """The error in a line, its traceback in the log. Ends the program if the GPU does nothing any more for it."""
    traceback.print_exc()
    # PyTorch's errors have a paragraph; the first line says what happened.
    line = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:200]
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            raise SystemExit(f"{line}; after that the GPU refuses this process") from None
    return line
