"""The wheel of `make wheel`, in an empty environment: what is in it, what it asks for, and that the tests pass there.

MTLFAST_WHEEL names it, MTLFAST_WHEEL_TORCH what to install beside it (torch==2.13.0); `make wheel-check` sets both.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from mtlfast import _native

WHEEL = Path(os.environ.get("MTLFAST_WHEEL", "none"))
TORCH = os.environ.get("MTLFAST_WHEEL_TORCH", "")
TESTS = Path(__file__).parent
NEEDED = ["numpy", "pytest", "pytest-xdist", "hypothesis", "setuptools", "ninja", "scikit-learn", "matplotlib", "tqdm"]
MINOR = _native._minor(torch.__version__)
CUDA_TORCH_GIB = 12  # to install one: its wheel, the CUDA libraries, and both unpacked

pytestmark = pytest.mark.skipif(not WHEEL.exists(), reason="make wheel-check builds a wheel and sets MTLFAST_WHEEL")


def test_it_is_small_and_names_its_torch():
    assert WHEEL.stat().st_size < 30e6
    with zipfile.ZipFile(WHEEL) as wheel:
        metadata = next(wheel.read(n).decode() for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    assert f"+torch{MINOR}-" in WHEEL.name
    required = re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)
    assert [line for line in required if "extra ==" not in line] == [f"torch=={MINOR}.*"]


def test_it_holds_the_package_and_nothing_else():
    with zipfile.ZipFile(WHEEL) as wheel:
        names = [name for name in wheel.namelist() if not name.endswith("/")]
    package = re.compile(r"mtlfast/.*\.py|mtlfast/_C\.[\w-]+\.so|mtlfast/(_build\.json|py\.typed)")
    # auditwheel puts libraries from outside the policy into mtlfast.libs: torch's own are excluded, others show here.
    assert [n for n in names if not package.fullmatch(n) and ".dist-info/" not in n] == []
    assert sum(name.endswith(".so") for name in names) == 1
    assert "manylinux_2_" in WHEEL.name


@pytest.fixture(scope="module")
def beside_torch(tmp_path_factory) -> Path:
    """Python in an empty environment with the wheel and its torch; `installed` adds to it what the tests need."""
    free = shutil.disk_usage(tmp_path_factory.getbasetemp()).free / 2**30
    if free < CUDA_TORCH_GIB and ("===" in TORCH or not torch.__version__.endswith("+cpu")):
        pytest.skip(f"a CUDA build of torch takes up to {CUDA_TORCH_GIB} GiB of disk, and {free:.0f} are free")
    folder = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    install(python, TORCH)  # first: the wheel's own requirement would take another build
    install(python, WHEEL)
    return python


@pytest.fixture(scope="module")
def installed(beside_torch) -> Path:
    """Python in that environment with the wheel's extra `cli` and what the tests need."""
    install(beside_torch, f"{WHEEL}[cli]", *NEEDED)
    return beside_torch


def install(python: Path, *packages: str | Path) -> None:
    subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages], check=True)


def run(python: Path, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and not key.startswith("MTLFAST_")}
    env |= {"MTLFAST_REQUIRE_NATIVE": "1", "COLUMNS": "200"} | environment
    return subprocess.run([python, *arguments], cwd=cwd, env=env, capture_output=True, text=True)


# Before `installed` adds to the environment: this test comes first.
def test_torch_alone_is_enough_to_train(beside_torch, tmp_path):
    code = """
import importlib.util, torch, mtlfast
assert importlib.util.find_spec("rich") is None
net = torch.nn.Linear(3, 2)
losses = net(torch.ones(4, 3)).square().mean(0).unbind()
mtlfast.backward(losses, mtlfast.aggregation.PCGrad(), shared=net)
print(net.weight.grad.isfinite().all())
"""
    said = run(beside_torch, "-c", code, cwd=tmp_path)
    assert said.stdout == "tensor(True)\n", said.stderr
    assert "PCGrad" in run(beside_torch, "-m", "mtlfast", "methods", cwd=tmp_path).stdout


def test_it_imports_and_says_what_it_is(beside_torch, tmp_path):
    info = run(beside_torch, "-m", "mtlfast", "info", cwd=tmp_path)
    assert info.returncode == 0, info.stderr
    assert re.search(rf"in use\s+compiled kernels.*built for torch\s+{MINOR}", info.stdout, re.S)
    assert re.search(r"CUDA kernels\s+\d+ kernels for \d", info.stdout)


def test_the_tests_pass_there(installed, tmp_path):
    shutil.copytree(TESTS, tmp_path / "tests", ignore=shutil.ignore_patterns("emulator", "__pycache__"))
    shutil.copy(TESTS.parent / "pyproject.toml", tmp_path)
    tests = run(installed, "-m", "pytest", "tests", "-n", "2", "-p", "no:cacheprovider", cwd=tmp_path)
    assert tests.returncode == 0, tests.stdout[-4000:]
    passed = re.search(r"(\d+) passed", tests.stdout)
    assert int(passed.group(1)) > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a driver")
def test_a_cuda_call_fails_with_torchs_own_sentence(installed, tmp_path):
    code = """
import torch, mtlfast
try:
    mtlfast.ops.gram(mtlfast.TaskGradients.from_rows([[torch.ones(3, device="cuda")]]))
except (AssertionError, RuntimeError) as error:
    print(torch.version.cuda, str(error).splitlines()[0])
"""
    said = run(installed, "-c", code, cwd=tmp_path).stdout
    assert re.match(r"None Torch not compiled with CUDA|\d+\.\d+ Found no NVIDIA driver", said), said
