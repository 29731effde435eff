"""Makes Triton's interpreter compute as a GPU does where it would not, and fail where a GPU would.

Two of its operations round otherwise: a fused multiply-add rounds twice, and float32 to bfloat16 cuts off. Up to Triton
3.6 the larger of a number and NaN is NaN, which on a GPU is the number. And it
believes `tl.multiple_of`, where a GPU refuses the address. Its state is global: here one thread at a time launches a
kernel. All these names are Triton's own affair; a version that moves them fails here and not in a tolerance.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def make_honest() -> None:
    builder = interpreter.InterpreterBuilder
    cast, launch, lock = builder.cast_impl, interpreter.GridExecutor.__call__, threading.RLock()

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return cast(self, source, target)
        bits = source.data.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return interpreter.TensorHandle(np.where(np.isnan(source.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)

    def set_attr(self: Any, key: str, values: Any) -> None:
        if key == "tt.divisibility":
            assert not (self.data % max(values)).any(), f"not all are multiples of {max(values)}"

    def create_minnumf(self: Any, x: Any, y: Any) -> Any:
        return self.binary_op(x, y, np.fmin)

    def create_maxnumf(self: Any, x: Any, y: Any) -> Any:
        return self.binary_op(x, y, np.fmax)

    def launch_alone(self: Any, *arguments: Any, **named: Any) -> Any:
        with lock:
            return launch(self, *arguments, **named)

    assert callable(builder.create_fma)
    assert callable(builder.create_minnumf)
    assert callable(builder.create_maxnumf)
    assert callable(interpreter.TensorHandle.set_attr)
    builder.create_fma, builder.cast_impl = create_fma, cast_impl
    builder.create_minnumf, builder.create_maxnumf = create_minnumf, create_maxnumf
    interpreter.TensorHandle.set_attr = set_attr
    interpreter.GridExecutor.__call__ = launch_alone
