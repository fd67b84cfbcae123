"""The CUDA kernels on the CPU: calls the emulated launchers on CPU tensors.

Every output is written between two guards of noise, which a call must leave alone.
"""

import ctypes
import re
import subprocess
from collections.abc import Sequence

import torch
from host_build import CUDA, HERE, build
from torch import Tensor

from mtlfast import TaskGradients, reference
from mtlfast.ops.grad_drop import wide_dtype

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # in the order of DType in kernels.h
GUARD = 64  # bytes


class TaskView(ctypes.Structure):
    """As in csrc/kernels.h, with what it points to."""

    _fields_ = (
        ("num_tasks", ctypes.c_int64),
        ("num_tensors", ctypes.c_int64),
        ("data", ctypes.POINTER(ctypes.c_void_p)),
        ("offsets", ctypes.POINTER(ctypes.c_int64)),
        ("dtype", ctypes.c_int32),
        ("groups", ctypes.POINTER(ctypes.c_int64)),
    )


class SolveArguments(ctypes.Structure):
    """As in csrc/cuda/launchers.h."""

    _fields_ = (
        ("method", ctypes.c_char_p),
        ("groups", ctypes.c_int64),
        ("num_tasks", ctypes.c_int64),
        ("gram", ctypes.c_void_p),
        ("params", ctypes.POINTER(ctypes.c_double)),
        ("inputs", ctypes.POINTER(ctypes.c_void_p)),
        ("state", ctypes.c_void_p),
        ("state_size", ctypes.c_int64),
        ("tasks", ctypes.POINTER(ctypes.c_int64)),
        ("mask", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
    )


def view_of(grads: TaskGradients, groups: Sequence[int] | None = None) -> TaskView:
    """The marshalled task gradients, with each tensor's group; the caller keeps `grads` alive."""
    columns = [grads.column(t) for t in range(len(grads.shapes))]
    pointers = [0 if g is None or g.numel() == 0 else g.data_ptr() for column in columns for g in column]
    offsets = [0]
    for shape in grads.shapes:
        offsets.append(offsets[-1] + (0 if shape is None else shape.numel()))
    return TaskView(
        grads.num_tasks,
        len(columns),
        (ctypes.c_void_p * max(1, len(pointers)))(*pointers),
        (ctypes.c_int64 * len(offsets))(*offsets),
        DTYPES.index(grads.dtype),
        None if groups is None else (ctypes.c_int64 * max(1, len(groups)))(*groups),
    )


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _addresses(tensors: Sequence[Tensor | None] | None) -> object:
    """The tensors' addresses as an array, 0 for None; a null pointer without tensors."""
    if tensors is None:
        return ctypes.c_void_p(None)
    return (ctypes.c_void_p * max(1, len(tensors)))(*(0 if x is None else x.data_ptr() for x in tensors))


class Guarded:
    """New tensors, each of noise between two guards; `misaligned` by so many elements."""

    def __init__(self) -> None:
        self.rooms: list[tuple[Tensor, int, int]] = []

    def new(self, shape: Sequence[int], dtype: torch.dtype, misaligned: int = 0) -> Tensor:
        """A tensor of NaNs."""
        numel, size = torch.Size(shape).numel(), dtype.itemsize
        begin = GUARD + misaligned * size
        room = torch.full((begin + numel * size + GUARD,), 0xFF, dtype=torch.uint8)
        self.rooms.append((room, begin, begin + numel * size))
        return room[begin : begin + numel * size].view(dtype).view(shape)

    def check(self) -> None:
        """The guards are as they were."""
        for room, begin, end in self.rooms:
            assert (room[:begin] == 0xFF).all(), "written before an output"
            assert (room[end:] == 0xFF).all(), "written behind an output"


class Emulator:
    """The launchers of csrc/cuda/launchers.h."""

    def __init__(self) -> None:
        sources = [s for s in sorted(CUDA.glob("*.cu")) if s.name != "device.cu"]
        self.library = ctypes.CDLL(build("kernels", [*sources, HERE / "emulator.cpp"]))
        self.library.emulator_launched.restype = ctypes.c_char_p
        self.library.emulator_workspace_size.restype = ctypes.c_int64
        self.launches: list[str] = []  # the kernels of the last call
        self.cases: set[tuple[str, int]] = set()  # kernels that ran, with their number of tasks

    def call(self, name: str, num_tasks: int, *arguments: object, seed: int = 0, most_blocks: int = 4) -> None:
        """Runs a launcher; an error it returns is raised."""
        self.library.emulator_set(ctypes.c_uint64(seed), most_blocks)
        function = getattr(self.library, f"emulate_{name}")
        function.restype = ctypes.c_char_p
        error = function(*arguments)
        self.launches = self.library.emulator_launched().decode().replace(" ", "").splitlines()
        self.cases |= {(kernel, num_tasks) for kernel in self.launches}
        if error:
            raise RuntimeError(error.decode())

    def compiled(self) -> set[str]:
        """Every kernel that the launchers can reach, by name, without spaces."""
        symbols = subprocess.run(["nm", "-C", self.library._name], capture_output=True, text=True, check=True).stdout
        return {name.replace(" ", "") for name in re.findall(r"void mtlfast::cuda::(\w+_kernel<[^(]*>)\(", symbols)}

    def gram(
        self, grads: TaskGradients, name: str = "gram", groups: Sequence[int] | None = None, **options: int
    ) -> Tensor:
        """[K, K]; `name`: gram, gram_exact or gram_plain. With `groups`, which are sorted, [G, K, K]."""
        return self._sums(name, grads, (grads.num_tasks, grads.num_tasks), options, groups=groups)

    def cross_gram(
        self,
        grads: TaskGradients,
        other: TaskGradients,
        exact: bool,
        groups: Sequence[int] | None = None,
        **options: int,
    ) -> Tensor:
        """[K, K'], or [G, K, K']."""
        rows, K = TaskGradients([*grads.rows, *other.rows]), grads.num_tasks
        shape, split = (K, other.num_tasks), ctypes.c_int64(K)
        return self._sums("cross_gram", rows, shape, options, split, int(exact), groups=groups)

    def norms(self, grads: TaskGradients, groups: Sequence[int] | None = None, **options: int) -> Tensor:
        """[K]; with `groups` their squares, [G, K]."""
        return self._sums("norms", grads, (grads.num_tasks,), options, groups=groups)

    def _sums(
        self,
        name: str,
        grads: TaskGradients,
        shape: tuple[int, ...],
        options: dict[str, int],
        *arguments: object,
        groups: Sequence[int] | None = None,
    ) -> Tensor:
        memory = Guarded()
        leading = () if groups is None else (max(groups, default=-1) + 1,)
        out = memory.new((*leading, *shape), torch.float64)
        view, pointer = ctypes.byref(view_of(grads, groups)), ctypes.c_void_p(out.data_ptr())
        self.call(name, grads.num_tasks, view, *arguments, pointer, **options)
        memory.check()
        return out

    def combine(
        self,
        grads: TaskGradients,
        weights: Tensor,
        out: Sequence[Tensor | None] | None = None,
        accumulate: bool = False,
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
        misaligned: int = 0,
        groups: Sequence[int] | None = None,
        **options: int,
    ) -> list[Tensor | None]:
        """As ops.combine; outputs are dense."""
        memory, dtype = Guarded(), dtype or grads.dtype
        leading = tuple(weights.shape[:-1]) if groups is None else ()
        if out is None:
            out = [None if s is None else memory.new((*leading, *s), dtype, misaligned) for s in grads.shapes]
        dtype = next((x.dtype for x in out if x is not None), dtype)
        coefficients = weights.double().contiguous()
        self.call(
            "combine",
            grads.num_tasks,
            ctypes.byref(view_of(grads, groups)),
            ctypes.c_void_p(coefficients.data_ptr()),
            ctypes.c_int64(leading[0] if leading else 1),
            ctypes.c_double(scale),
            int(accumulate),
            DTYPES.index(dtype),
            _addresses(out),
            **options,
        )
        memory.check()
        return list(out)

    def grad_drop(
        self,
        grads: TaskGradients,
        seed: Tensor | None = None,
        uniform: Sequence[Tensor | None] | None = None,
        thresholds: Sequence[Tensor | None] | None = None,
        leak: Tensor | None = None,
        round_each: bool = False,
        out: Sequence[Tensor | None] | None = None,
        misaligned: int = 0,
        purity: bool = False,
        **options: int,
    ) -> list[Tensor | None]:
        """As ops.grad_drop, or with `purity` as ops.sign_purity; outputs are dense."""
        form = 3 if purity else 0 if seed is not None else 1 if uniform is not None else 2
        wide = None if leak is None else leak.double().contiguous()
        return self._each(
            "grad_drop",
            grads,
            (form, int(round_each), _address(wide), _address(seed), _addresses(uniform), _addresses(thresholds)),
            out,
            wide_dtype(grads) if purity else grads.dtype,
            misaligned,
            options,
        )

    def trimmed_mean(
        self,
        grads: TaskGradients,
        trim_number: int,
        out: Sequence[Tensor | None] | None = None,
        misaligned: int = 0,
        **options: int,
    ) -> list[Tensor | None]:
        """As ops.trimmed_mean; outputs are dense."""
        return self._each("trimmed_mean", grads, (ctypes.c_int64(trim_number),), out, grads.dtype, misaligned, options)

    def _each(
        self,
        name: str,
        grads: TaskGradients,
        arguments: tuple[object, ...],
        out: Sequence[Tensor | None] | None,
        dtype: torch.dtype,
        misaligned: int,
        options: dict[str, int],
    ) -> list[Tensor | None]:
        """Calls an op that writes one tensor for each tensor of the gradients."""
        memory = Guarded()
        if out is None:
            out = [None if shape is None else memory.new(shape, dtype, misaligned) for shape in grads.shapes]
        self.call(name, grads.num_tasks, ctypes.byref(view_of(grads)), *arguments, _addresses(out), **options)
        memory.check()
        return list(out)

    def flatten(
        self, grads: TaskGradients, dtype: torch.dtype | None = None, misaligned: int = 0, **options: int
    ) -> Tensor:
        """[K, P]."""
        memory = Guarded()
        numel = sum(shape.numel() for shape in grads.shapes if shape is not None)
        out = memory.new((grads.num_tasks, numel), dtype or grads.dtype, misaligned)
        view, pointer = ctypes.byref(view_of(grads)), ctypes.c_void_p(out.data_ptr())
        self.call("flatten", grads.num_tasks, view, DTYPES.index(out.dtype), pointer, **options)
        memory.check()
        return out

    def scale_(self, grads: TaskGradients, factors: Tensor, **options: int) -> TaskGradients:
        wide = factors.double()
        view, pointer = ctypes.byref(view_of(grads)), ctypes.c_void_p(wide.data_ptr())
        self.call("scale", grads.num_tasks, view, pointer, **options)
        return grads

    def advance_(
        self,
        grads: TaskGradients,
        state: TaskGradients,
        coefficients: Tensor,
        square: bool = False,
        out: Sequence[Tensor | None] | None = None,
        dtype: torch.dtype | None = None,
        misaligned: int = 0,
        **options: int,
    ) -> list[Tensor | None]:
        """As ops.advance_, with keep, take, of_state and of_grads as coefficients [4, K]; outputs are dense."""
        memory, dtype = Guarded(), dtype or grads.dtype
        if out is None:
            out = [None if s is None else memory.new(s, dtype, misaligned) for s in grads.shapes]
        pointers = [0 if x is None else x.data_ptr() for x in out]
        wide = coefficients.double().contiguous()
        self.call(
            "advance",
            grads.num_tasks,
            ctypes.byref(view_of(grads)),
            ctypes.byref(view_of(state)),
            ctypes.c_void_p(wide.data_ptr()),
            int(square),
            DTYPES.index(dtype),
            (ctypes.c_void_p * max(1, len(pointers)))(*pointers),
            **options,
        )
        memory.check()
        return list(out)

    def excess_risks(
        self, grads: TaskGradients, sums: TaskGradients, eps: float, factors: Tensor, **options: int
    ) -> Tensor:
        """[K]."""
        memory, wide = Guarded(), factors.double()
        out = memory.new((grads.num_tasks,), torch.float64)
        views = [ctypes.byref(view_of(x)) for x in (grads, sums)]
        places = [ctypes.c_void_p(x.data_ptr()) for x in (wide, out)]
        self.call("excess_risks", grads.num_tasks, *views, ctypes.c_double(eps), *places, **options)
        memory.check()
        return out

    def solve(
        self,
        gram: Tensor,
        method: str,
        params: dict[str, float] | Sequence[float] = (),
        inputs: dict[str, Tensor] | Sequence[Tensor | None] = (),
        state: Tensor | None = None,
        tasks: Sequence[int] | None = None,
        mask: Tensor | None = None,
        **options: int,
    ) -> Tensor:
        """As ops.solve."""
        memory, K, solver = Guarded(), gram.shape[-1], reference.SOLVERS[method]
        if not isinstance(params, dict):
            params = dict(zip(solver.params, params, strict=True))
        if not isinstance(inputs, dict):
            inputs = dict(zip(solver.inputs, inputs, strict=False))
        groups = gram.shape[:-2].numel()
        shape = gram.shape if solver.square else gram.shape[:-1]
        size = self.library.emulator_workspace_size(method.encode(), ctypes.c_int64(K), mask is not None)
        out, workspace = memory.new(shape, torch.float64), memory.new((groups, size), torch.float64)
        guarded_state = None
        if state is not None:
            guarded_state = memory.new(state.shape, torch.float64)
            guarded_state.copy_(state)
        wide = {name: x.double().contiguous() for name, x in inputs.items() if x is not None}
        addresses = [wide[name].data_ptr() if name in wide else None for name in solver.inputs]
        arguments = SolveArguments(
            method=method.encode(),
            groups=groups,
            num_tasks=K,
            gram=gram.data_ptr(),
            params=(ctypes.c_double * len(params))(*(params[name] for name in solver.params)),
            inputs=(ctypes.c_void_p * len(addresses))(*addresses),
            state=None if guarded_state is None else guarded_state.data_ptr(),
            state_size=0 if guarded_state is None else guarded_state.numel() // groups,
            tasks=None if tasks is None else (ctypes.c_int64 * len(tasks))(*tasks),
            mask=None if mask is None else mask.data_ptr(),
            workspace=workspace.data_ptr(),
            out=out.data_ptr(),
        )
        self.call("solve", K, ctypes.byref(arguments), **options)
        memory.check()
        if state is not None and guarded_state is not None:
            state.copy_(guarded_state)
        return out
