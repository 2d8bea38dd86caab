"""What kernels in Gluon share. Gluon can't call Triton's device functions, so some of these exist there as well."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# Triton 3.6 has these by other names.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_Memory = gl.shared_memory_descriptor
reinterpret = _Memory.reinterpret if hasattr(_Memory, "reinterpret") else _Memory._reinterpret

_QUARTERS = 4  # of a multiprocessor, which its warps are shared out to
_REGISTERS = 16384  # of a quarter
_MOST_REGISTERS = 255  # of a thread
_WARP = 32


@gluon.jit
def add(a, b):
    """For scans."""
    return a + b


def registers(num_warps: int, programs: int) -> int:
    """Registers of each thread where so many programs share a multiprocessor; they are given out by eights."""
    warps = -(-num_warps * programs // _QUARTERS)  # of the quarter that has the most
    return min(_MOST_REGISTERS, _REGISTERS // (_WARP * warps) // 8 * 8)
