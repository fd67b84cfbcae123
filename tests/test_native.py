"""mtlfast with and without the extension. Each case runs in a Python process of its own."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mtlfast
from mtlfast import _native

PACKAGE = Path(mtlfast.__file__).parent
CHECKOUT = Path(__file__).parents[1]
SURGERY = """
import torch, mtlfast, warnings
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    grads = mtlfast.TaskGradients.from_rows([[torch.ones(3), torch.ones(2)], [-torch.ones(3), None]])
    print(mtlfast.ops.gram(grads).tolist())
    p = torch.nn.Parameter(torch.ones(4))
    mtlfast.backward([p.sum(), -2 * p.sum()], mtlfast.aggregation.PCGrad(), shared=[p])
    print(p.grad.tolist())
print([str(w.message) for w in seen if w.category is RuntimeWarning])
"""


def python(code: str, path: Path = PACKAGE.parent, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith("MTLFAST_")}
    return subprocess.run(
        [sys.executable, *(code.split() if code.startswith("-m") else ["-c", code])],
        env={**env, "PYTHONPATH": str(path), "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        cwd=path,
    )


@pytest.fixture(scope="module")
def without_extension(tmp_path_factory) -> Path:
    """A copy of the package as an installation without a compiler would be."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(PACKAGE, folder / "mtlfast", ignore=shutil.ignore_patterns("_C*", "_build.json", "__pycache__"))
    return folder


def test_without_the_extension_the_reference_serves_with_one_warning(without_extension):
    run = python(SURGERY, without_extension)
    gram, grad, warned = run.stdout.splitlines()
    assert gram == "[[5.0, -3.0], [-3.0, 3.0]]"
    assert grad == "[0.0, 0.0, 0.0, 0.0]"
    assert warned == (
        "['this copy of mtlfast was installed without its compiled extension; "
        "mtlfast runs its plain-PyTorch reference instead']"
    )


def test_require_native_turns_the_warning_into_the_error(without_extension):
    run = python(SURGERY, without_extension, MTLFAST_REQUIRE_NATIVE="1")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == (
        "ImportError: MTLFAST_REQUIRE_NATIVE is set, but "
        "this copy of mtlfast was installed without its compiled extension"
    )
    assert python("import mtlfast", without_extension, MTLFAST_REQUIRE_NATIVE="1").returncode == 0


def test_another_torch_is_named(without_extension):
    (without_extension / "mtlfast" / "_build.json").write_text(json.dumps({"torch": "2.0.1+cpu"}))
    run = python("import mtlfast; print(mtlfast._native.REASON)", without_extension)
    (without_extension / "mtlfast" / "_build.json").unlink()
    assert (
        run.stdout.strip() == f"mtlfast._C was built for torch 2.0.1+cpu, this is torch {torch.__version__}: rebuild it"
    )


def test_another_python_is_named(without_extension):
    (without_extension / "mtlfast" / "_build.json").write_text(
        json.dumps({"torch": torch.__version__, "python": "3.9"})
    )
    run = python("import mtlfast; print(mtlfast._native.REASON)", without_extension)
    (without_extension / "mtlfast" / "_build.json").unlink()
    this = platform.python_version()
    assert run.stdout.strip() == f"mtlfast._C was built for Python 3.9, this is Python {this}: rebuild it"


def test_an_extension_that_does_not_load_is_named(without_extension):
    (without_extension / "mtlfast" / "_build.json").write_text(json.dumps({"torch": torch.__version__}))
    broken = without_extension / "mtlfast" / "_C.abi3.so"
    broken.write_bytes(b"not a library")
    run = python("import mtlfast; print(mtlfast._native.REASON)", without_extension)
    broken.unlink()
    (without_extension / "mtlfast" / "_build.json").unlink()
    assert run.stdout.startswith("mtlfast._C does not load: ")


def test_info_without_the_extension(without_extension):
    run = python("-m mtlfast info", without_extension)
    assert run.returncode == 0, run.stderr
    assert "plain-PyTorch reference: this copy of mtlfast was installed without its compiled extension" in run.stdout


@pytest.mark.native
def test_info():
    run = python("-m mtlfast info", MTLFAST_REQUIRE_NATIVE="1")
    assert run.returncode == 0, run.stderr
    lines = dict(line.split("  ", 1) for line in run.stdout.splitlines() if "  " in line)
    facts = _native.build_facts()
    assert lines["in use"].strip() == "compiled kernels"
    assert lines["built for torch"].strip() == facts["torch"]
    assert facts["compiler"] in lines["built with"]
    assert f"in use: {_native.C.isa()}" in lines["CPU kernels"]
    cuda = lines["CUDA kernels"].strip()
    if facts["nvcc"] is None:
        assert cuda == f"none in this build, as {facts['without_cuda']}"
    else:
        assert f"nvcc {facts['nvcc']} ({facts['nvcc_found']})" in lines["built with"]
        assert re.match(r"[1-9]\d+ kernels for \d", cuda)
    assert lines["environment"].strip() == "MTLFAST_REQUIRE_NATIVE=1"


@pytest.mark.native
def test_instruction_sets_are_chosen_by_name():
    ask = "import mtlfast; print(mtlfast._native.C.isa())"
    for isa in _native.build_facts()["cpu_units"]:
        run = python(ask, MTLFAST_CPU_CAPABILITY=isa)
        assert run.stdout.strip() == isa or "this processor lacks" in run.stderr
    assert python(ask, MTLFAST_CPU_CAPABILITY="baseline").stdout.strip() == "baseline"
    assert "must be one of baseline, avx2, avx512" in python(ask, MTLFAST_CPU_CAPABILITY="sse9").stderr
    assert python("-m mtlfast info", MTLFAST_CPU_CAPABILITY="sse9").returncode == 0


@pytest.mark.native
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a driver")
def test_a_machine_without_a_driver_imports_and_says_so():
    if _native.build_facts()["nvcc"] is None:
        assert _native.C.cuda_facts() == {}
        return
    facts = _native.C.cuda_facts()
    assert facts["devices"] == 0
    assert facts["error"]
    assert facts["runtime"] >= 12000
    assert "registered at" in torch._C._dispatch_dump("mtlfast::scale_")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("mtlfast::scale_", "CUDA")


@pytest.mark.skipif(not (CHECKOUT / "setup.py").exists(), reason="needs the checkout")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_process_may_fork_after_the_import():
    """The import must start no threads of OpenMP, for which a forked process would wait forever."""
    code = """
import os, torch, mtlfast
child = os.fork()
if not child:
    torch.ones(1000, 1000).mul(2).clone()
    os._exit(0)
for _ in range(300):
    if os.waitpid(child, os.WNOHANG)[0]:
        break
    __import__("time").sleep(0.1)
else:
    os.kill(child, 9)
    raise SystemExit("the child waits")
"""
    run = python(code, OMP_NUM_THREADS="2")
    assert run.returncode == 0, run.stderr


def test_a_build_without_torch_says_what_to_type(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')")
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr == (
        "mtlfast builds against the torch that will run it: install torch first, then type "
        "`pip install --no-build-isolation .`\n"
    )
