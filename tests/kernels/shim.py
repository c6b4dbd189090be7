"""Mends Triton 3.6's interpreter where it computes something else than a GPU.

Three bugs: a product of bfloat16 blocks multiplies their bits as integers (triton#11584), float32 is cut off instead of
rounded on its way to bfloat16, and loop bounds from memory fail with numpy 2.4 (triton#9171). Arithmetic on bfloat16
outside a product is as wrong, and no kernel should need it: here it raises. `interpreter_shim.py` tests all of it.
"""

from typing import Any

import numpy as np


def bf16_to_float32(bits: np.ndarray) -> np.ndarray:
    """The numbers that uint16 stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bf16(numbers: np.ndarray) -> np.ndarray:
    """Rounded to the nearest, ties to even, as uint16."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), np.uint16(0x7FC0), rounded)


def install() -> None:
    """Mends the interpreter of this process; a second call does nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder: Any = interpreter.InterpreterBuilder
    if hasattr(builder, "unmended"):
        return
    handle: Any = interpreter.TensorHandle
    builder.unmended = {name: getattr(builder, name) for name in ("create_dot", "cast_impl", "create_fp_to_fp")}
    binary_op, patch_tensor = builder.binary_op, interpreter._patch_lang_tensor

    def widened(x: Any) -> Any:
        return handle(bf16_to_float32(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return builder.unmended["create_dot"](self, widened(a), widened(b), *args)

    def cast(name: str) -> Any:
        def mended(self: Any, source: Any, target: Any, *args: Any) -> Any:
            if tl.bfloat16 not in (source.dtype.scalar, target.scalar):
                return builder.unmended[name](self, source, target, *args)
            numbers = widened(source).data
            if target.scalar == tl.bfloat16:
                return handle(float32_to_bf16(numbers), tl.bfloat16)
            return handle(numbers.astype(interpreter._get_np_dtype(target)), target.scalar)

        return mended

    def no_bf16(self: Any, left: Any, right: Any, op: Any) -> Any:
        if tl.bfloat16 in (left.dtype.scalar, right.dtype.scalar):
            raise TypeError(f"{op.__name__} of bfloat16: kernels convert to float32 after loading")
        return binary_op(self, left, right, op)

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    builder.create_dot = create_dot
    builder.cast_impl = cast("cast_impl")
    builder.create_fp_to_fp = cast("create_fp_to_fp")
    builder.binary_op = no_bf16
    interpreter._patch_lang_tensor = patch_lang_tensor
