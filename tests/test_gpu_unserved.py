"""A GPU that cannot run the compiled kernels is served by the reference: GPU, driver and build are faked."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import draw
from test_native import python

import mtlfast
from mtlfast import TaskGradients, _native, ops
from mtlfast._cli import main
from mtlfast.aggregation import PCGrad

GPU = torch.device("cuda", 0)
BUILD = {
    "torch": torch.__version__,
    "compiler": "g++ 12",
    "cpu_units": ["baseline"],
    "nvcc": "13.0.88",
    "nvcc_found": "on the PATH: /usr/bin/nvcc",
    "cuda_archs": ["8.0", "9.0"],
    "cuda_kernels": {"sm_80": {"scale_kernel<float>": {}}},
}
OF_T4 = "mtlfast's CUDA kernels were built for 8.0, 9.0, and Tesla T4 has compute capability 7.5"
NO_IMAGE = "cudaErrorNoKernelImageForDevice"


class Machine:
    """One GPU, its driver, and what the CUDA runtime answers when it is asked for a kernel there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: str | None = None
        self.driver, self.asked = 13000, 0
        self.build = dict(BUILD)
        self.patch = monkeypatch
        native = SimpleNamespace(cuda_error=self.ask, cuda_facts=self.facts, isa=lambda: "baseline")
        monkeypatch.setattr(_native, "C", native)
        monkeypatch.setattr(_native, "REASON", "")
        monkeypatch.setattr(_native, "build_facts", lambda: self.build)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        self.has("Tesla T4", 7, 5)

    def has(self, name: str, *capability: int) -> None:
        self.patch.setattr(torch.cuda, "get_device_name", lambda index: name)
        self.patch.setattr(torch.cuda, "get_device_capability", lambda index: capability)

    def ask(self, index: int) -> str | None:
        self.asked += 1
        return self.error

    def facts(self) -> dict[str, object]:
        return {"runtime": 13000, "driver": self.driver, "devices": 1, "error": None}


ASK = _native.why_not


def forget() -> None:
    ASK.cache_clear()
    _native._complain.cache_clear()


@pytest.fixture
def machine(monkeypatch):
    forget()
    monkeypatch.delenv("MTLFAST_REQUIRE_NATIVE", raising=False)
    yield Machine(monkeypatch)
    forget()


def test_a_gpu_that_runs_the_kernels_is_served_and_asked_once(machine):
    assert _native.serves(GPU)
    assert _native.serves(GPU)
    assert machine.asked == 1


@pytest.mark.parametrize("error", [NO_IMAGE, "cudaErrorInvalidDeviceFunction", "cudaErrorInvalidKernelImage"])
def test_a_gpu_without_machine_code_is_named_once(machine, error):
    machine.error = error
    with pytest.warns(RuntimeWarning) as seen:
        assert not _native.serves(GPU)
    assert [str(w.message) for w in seen] == [
        f"{OF_T4}: build mtlfast with TORCH_CUDA_ARCH_LIST=7.5; mtlfast runs its plain-PyTorch reference instead"
    ]
    assert not _native.serves(GPU)  # and without a warning, which would be an error here
    assert machine.asked == 1


def test_what_an_older_gpu_needs(machine):
    machine.error = NO_IMAGE
    machine.has("Tesla V100", 7, 0)
    assert _native.why_not(GPU).endswith(
        "build mtlfast with TORCH_CUDA_ARCH_LIST=7.0 and nvcc 12, as nvcc 13 compiles for 7.5 and newer"
    )
    forget()
    machine.has("Tesla P100", 6, 0)
    assert _native.why_not(GPU).endswith("and Tesla P100 has compute capability 6.0: they need 7.0 or newer")


def test_a_driver_that_cannot_compile_ptx(machine):
    machine.error = "cudaErrorUnsupportedPtxVersion"
    machine.has("GPU of later", 13, 0)
    assert _native.why_not(GPU) == (
        "mtlfast's CUDA kernels were built for 8.0, 9.0, and GPU of later has compute capability 13.0, for which its "
        "driver cannot compile them (cudaErrorUnsupportedPtxVersion): install a newer driver, or build mtlfast with "
        "TORCH_CUDA_ARCH_LIST=13.0"
    )


def test_a_driver_older_than_the_runtime(machine):
    machine.error, machine.driver = "cudaErrorInsufficientDriver", 12040
    assert _native.why_not(GPU) == (
        "mtlfast's CUDA kernels were built with CUDA 13.0, and the NVIDIA driver serves CUDA 12.4 at most: install "
        "driver 580.65.06 or newer, or build mtlfast with nvcc 12"
    )


def test_an_error_that_may_pass_is_left_to_the_launch(machine):
    machine.error = "cudaErrorMemoryAllocation"
    assert _native.serves(GPU)


def test_a_build_without_cuda_kernels_and_other_devices(machine):
    machine.build.update(nvcc=None, without_cuda="MTLFAST_CUDA=0")
    assert _native.why_not(GPU) == (
        "this build of mtlfast holds no CUDA kernels, as MTLFAST_CUDA=0: build it with nvcc 12.1 or newer"
    )
    assert _native.why_not(torch.device("mps")) == "mtlfast has no compiled kernels for mps"
    forget()
    machine.build["nvcc"] = "13.0.88"
    machine.patch.setattr(torch.version, "hip", "7.0")
    assert _native.why_not(GPU) == "mtlfast's kernels are for CUDA, and this torch is for ROCm"


def test_a_graph_may_be_traced_for_a_gpu_that_is_not_here(machine):
    machine.error = NO_IMAGE
    assert _native.serves(torch.device("cuda", 1))
    machine.patch.setattr(torch.cuda, "is_available", lambda: False)
    assert _native.serves(GPU)
    assert machine.asked == 0


def test_require_native_raises_every_time(machine):
    machine.error = NO_IMAGE
    machine.patch.setenv("MTLFAST_REQUIRE_NATIVE", "1")
    for _ in range(2):
        with pytest.raises(ImportError, match=r"MTLFAST_REQUIRE_NATIVE is set, but .* Tesla T4 has compute capability"):
            _native.serves(GPU)


def test_torch_compile_takes_the_answer_for_a_constant(monkeypatch):
    def sign(x: torch.Tensor) -> torch.Tensor:
        return x if _native.serves(GPU) else -x

    forget()
    monkeypatch.delenv("MTLFAST_REQUIRE_NATIVE", raising=False)
    monkeypatch.setattr(_native, "why_not", lambda device: OF_T4)
    with pytest.warns(RuntimeWarning, match="Tesla T4"):
        assert torch.compile(sign, backend="eager", fullgraph=True)(torch.ones(1)) == -1


def test_info_says_why(machine, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    main(["info"])
    assert "on cuda:0" not in capsys.readouterr().out
    forget()
    machine.error = NO_IMAGE
    main(["info"])
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if "  " in line)
    assert lines["on cuda:0"].strip() == (
        f"plain-PyTorch reference: {OF_T4}: build mtlfast with TORCH_CUDA_ARCH_LIST=7.5"
    )
    assert lines["CUDA kernels"].strip() == (
        "1 kernels for 8.0, 9.0, runtime of CUDA 13.0, driver of CUDA 13.0; 1 devices"
    )


def results(grads: TaskGradients) -> list[torch.Tensor]:
    gram = ops.gram(grads)
    scaled = TaskGradients.from_rows([[g.clone() for g in row] for row in grads.rows])
    p = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    mtlfast.backward([p.sum(), -2 * p[:2].sum()], PCGrad(), shared=[p])
    return [
        gram,
        ops.norms(grads),
        ops.solve(gram, "pcgrad", [0.0, 0.0]),
        ops.flatten(grads),
        *ops.combine(grads, torch.arange(3.0)),
        *ops.combine(
            grads, torch.ones(2, 3), out=[torch.zeros(2, *shape, dtype=grads.dtype) for shape in grads.shapes]
        ),
        *ops.unflatten(ops.flatten(grads)[0], grads),
        *ops.scale_(scaled, torch.arange(3.0)).flat(),
        *ops.project(grads).flat(),
        p.grad,
    ]


def test_every_op_asks_whether_its_device_is_served(monkeypatch):
    grads = draw(3, [(5, 7), (130,)], torch.float64)
    wanted = results(grads)

    def refuse(*_: object) -> None:
        raise AssertionError("a compiled kernel was called")

    monkeypatch.setattr(_native, "serves", lambda device: False)
    monkeypatch.setattr(TaskGradients, "run", refuse)
    monkeypatch.setattr(sys.modules["mtlfast.ops.solve"], "OP", refuse)  # `ops.solve` is the function
    for result, other in zip(results(grads), wanted, strict=True):
        torch.testing.assert_close(result, other)


# What the runtime asks of a driver, libcuda.so.1, before it decides.
FAKE_DRIVER = """
#define _GNU_SOURCE
#include <dlfcn.h>
int cuDriverGetVersion(int* version) { *version = 12040; return 0; }
int cuInit(unsigned flags) { return 0; }
int cuGetProcAddress_v2(const char* name, void** function, int version, unsigned long long flags, void* status) {
  *function = dlsym(RTLD_DEFAULT, name);
  return *function ? 0 : 500;
}
int cuGetProcAddress(const char* name, void** function, int version, unsigned long long flags) {
  return cuGetProcAddress_v2(name, function, version, flags, 0);
}
"""


@pytest.mark.native
@pytest.mark.skipif(torch.cuda.is_available() or shutil.which("cc") is None, reason="needs a C compiler and no driver")
@pytest.mark.skipif(_native.build_facts().get("nvcc") is None, reason="needs the compiled CUDA kernels")
def test_the_runtime_tells_an_older_driver(tmp_path: Path):
    (tmp_path / "driver.c").write_text(FAKE_DRIVER)
    library = str(tmp_path / "libcuda.so.1")
    subprocess.run(["cc", "-shared", "-fPIC", str(tmp_path / "driver.c"), "-o", library, "-ldl"], check=True)
    run = python("import mtlfast; print(mtlfast._native.C.cuda_facts())", LD_LIBRARY_PATH=str(tmp_path))
    facts = ast.literal_eval(run.stdout)
    assert facts["driver"] == 12040, run.stderr
    assert (facts["error"] is not None) == (facts["runtime"] >= 13000)
