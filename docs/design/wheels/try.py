"""Loads the skeleton, checks both of its doors against torch, and times what each way costs.

python docs/design/wheels/try.py OUT, where build.sh put it. With this checkout's mtlfast on PYTHONPATH, built for that
torch, the extension's own ways are checked and timed beside it.
"""

import gc
import platform
import sys
import time
import timeit
from collections.abc import Callable
from typing import Any

import torch

sys.path.insert(0, sys.argv[1])
import _skeleton

K, T = 8, 150
ops = torch.ops.mtlfast_skeleton


def rows_of(
    num_tensors: int, shape: tuple[int, ...], dtype: torch.dtype
) -> tuple[tuple[torch.Tensor | None, ...], ...]:
    """K rows, where task 1 does not reach tensor 1."""
    return tuple(
        tuple(None if k == t == 1 else torch.randn(shape, dtype=dtype) for t in range(num_tensors)) for k in range(K)
    )


def check(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Both doors against torch in float64, and bitwise against each other."""
    rows = rows_of(5, shape, dtype)
    flat = [[row.double().flatten() for row in task if row is not None] for task in rows]
    expected = torch.stack([torch.cat(task).norm() for task in flat])
    eager, registered = _skeleton.norms(rows), ops.norms([row for task in rows for row in task], K)
    assert torch.allclose(eager, expected, rtol=1e-13)
    assert torch.equal(eager, registered)


def show(what: str, call: Callable[[], Any], each: int = K * T, times: int = 20) -> None:
    """Processor time of one of `each` parts of a call, in ns: the least of 60 measurements."""
    gc.disable()
    fastest = min(timeit.repeat(call, number=times, repeat=60, timer=time.process_time)) / times / each * 1e9
    gc.enable()
    print(f"  {what:44}{fastest:8.1f}")


def main() -> None:
    """Checks, then times on one thread."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for shape in ((), (0,), (3,), (100, 70), (300, 401)):
            check(dtype, shape)
    print(f"Python {platform.python_version()}, torch {torch.__version__}: both doors right, and bitwise the same")

    torch.set_num_threads(1)
    rows = tuple(tuple(torch.ones(4) for _ in range(T)) for _ in range(K))
    flat = [row for task in rows for row in task]
    print(f"ns a tensor, K = {K}, T = {T}, 4 elements each")
    show("marshal: DLPack, borrowed", lambda: _skeleton.marshal_borrowed(rows))
    show("marshal: DLPack, owned", lambda: _skeleton.marshal_owned(rows))
    show("marshal: data_ptr() alone, in Python", lambda: [row.data_ptr() for row in flat])
    show("norms: marshalled by DLPack, borrowed", lambda: _skeleton.norms(rows))
    show("norms: torch.ops, boxed by the stable ABI", lambda: ops.norms(flat, K))
    show("output: DLPack", lambda: _skeleton.outputs(T), T)
    show("output: torch.empty in Python", lambda: [torch.empty(4, dtype=torch.float64) for _ in range(T)], T)
    one = torch.ones(4)
    print("ns a call, one tensor")
    show("norms: marshalled by DLPack", lambda: _skeleton.norms(((one,),)), 1, 200)
    show("norms: torch.ops, boxed by the stable ABI", lambda: ops.norms([one], 1), 1, 200)
    try:
        from mtlfast import _native
    except ImportError:
        return
    if (C := _native.C) is None:
        return
    for dtype in (torch.float32, torch.bfloat16):
        some = rows_of(5, (300, 401), dtype)
        assert torch.equal(C.norms(C.marshal(some)), _skeleton.norms(some))
    table, w = C.marshal(rows), torch.ones(K, dtype=torch.float64)
    print("the extension, ns a tensor")
    show("marshal: pybind11 and at::Tensor", lambda: C.marshal(rows))
    show("norms: of the marshalled table", lambda: C.norms(table))
    show("norms: torch.ops, unboxed", lambda: torch.ops.mtlfast.norms(flat, K))
    show("output: of combine, with its arithmetic", lambda: C.combine(table, w, 1.0, torch.float64), T)
    print("the extension, ns a call, one tensor")
    show("norms: marshalled by pybind11", lambda: C.norms(C.marshal(((one,),))), 1, 200)
    show("norms: torch.ops, unboxed", lambda: torch.ops.mtlfast.norms([one], 1), 1, 200)


if __name__ == "__main__":
    main()
