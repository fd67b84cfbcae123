"""What setup.py makes of the compilers that it finds: nvcc of several versions is faked."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (CHECKOUT / "setup.py").exists(), reason="needs the checkout")

# What `nvcc --list-gpu-arch` names.
PASCAL_TO_HOPPER = "60 61 70 72 75 80 86 87 89 90"
ARCHS = {
    "11.5": "35 50 60 61 70 72 75 80 86 87",
    "12.0": PASCAL_TO_HOPPER,
    "12.1": PASCAL_TO_HOPPER,
    "12.8": f"{PASCAL_TO_HOPPER} 100 101 120",
    "13.0": "75 80 86 87 88 89 90 100 110 103 120 121",
}
FAKE_NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  --list-gpu-arch) printf 'compute_%s\\n' {archs} ;;
  --dryrun) echo '#$ TOP={home}/bin/..'; echo '#$ LIBRARIES=  "-L{home}/stubs" "-L{home}/elsewhere"' ;;
esac
"""


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """In a session of its own, which has no terminal: what a build says goes to standard error."""
    env = {k: v for k, v in os.environ.items() if k != "TORCH_CUDA_ARCH_LIST" and not k.startswith("MTLFAST_")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=cwd,
        env={**env, **environment},
        capture_output=True,
        text=True,
        start_new_session=True,
    )


class Nvcc:
    """A folder with a script that answers as nvcc does."""

    def __init__(self, folder: Path, version: str) -> None:
        self.home, self.path = folder, folder / "bin" / "nvcc"
        self.path.parent.mkdir()
        self.path.write_text(FAKE_NVCC.format(version=version, archs=ARCHS[version], home=folder))
        self.path.chmod(0o755)
        (folder / "lib64").mkdir()
        (folder / "lib64" / "libcudart_static.a").touch()

    def chosen(self, cuda: str = "auto", archs: str = "all", home: Path | str = "") -> tuple[str, str]:
        """The architectures, or the reason why there are none; and what was said meanwhile."""
        code = "import toolkit; nvcc, reason = toolkit.cuda_toolkit(); print(reason or ' '.join(nvcc.archs))"
        environment = {"PATH": str(self.path.parent), "MTLFAST_CUDA": cuda, "TORCH_CUDA_ARCH_LIST": archs}
        environment["CUDA_HOME"] = str(home)
        run = python(code, CHECKOUT / "csrc", **environment)
        return run.stdout.strip(), run.stderr.strip()


def test_one_that_is_too_old_does_not_hide_one_in_cuda_home(tmp_path):
    for version in ("11.5", "12.8"):
        (tmp_path / version).mkdir()
    nvcc, other = Nvcc(tmp_path / "11.5", "11.5"), Nvcc(tmp_path / "12.8", "12.8")
    assert nvcc.chosen("1", "9.0", home=other.home) == ("9.0", "")


def test_ptx_is_kept_wherever_it_stands_and_blanks_name_no_architecture(tmp_path):
    nvcc = Nvcc(tmp_path, "12.1")
    assert nvcc.chosen(archs="12.0+PTX;8.0")[0] == "8.0+PTX"
    assert nvcc.chosen(archs="8.0\t9.0 ")[0] == "8.0 9.0"
    assert nvcc.chosen(archs=" ; ")[0].startswith("8.0 8.6")


@pytest.mark.parametrize("version", ["11.5", "12.0"])  # of Ubuntu 22.04 and 24.04
def test_an_nvcc_that_is_too_old_is_left_out_and_named(tmp_path, version):
    nvcc = Nvcc(tmp_path, version)
    reason = f"{nvcc.path} is nvcc {version}, expected 12.1 or newer"
    assert nvcc.chosen() == (reason, f"mtlfast: no CUDA kernels are built, as {reason}")
    assert nvcc.chosen("1") == ("", f"MTLFAST_CUDA=1, but {reason}")
    assert nvcc.chosen("0") == ("MTLFAST_CUDA=0", "")


def test_an_older_nvcc_compiles_for_fewer_gpus(tmp_path):
    nvcc = Nvcc(tmp_path, "12.1")
    without = "nvcc 12.1 cannot compile the kernels for 10.0, 12.0+PTX"
    assert nvcc.chosen() == (
        "8.0 8.6 8.9 9.0+PTX",
        f"mtlfast: {without}: CUDA kernels are built for 8.0, 8.6, 8.9, 9.0+PTX",
    )
    error = f"MTLFAST_CUDA=1, but {without} (TORCH_CUDA_ARCH_LIST says for what)"
    assert nvcc.chosen("1") == ("", error)
    assert nvcc.chosen("1", "8.0;9.0") == ("8.0 9.0", "")
    assert nvcc.chosen("1", "9.0a") == ("9.0a", "")


@pytest.mark.parametrize("version", ["12.8", "13.0"])
def test_a_newer_nvcc_compiles_for_all(tmp_path, version):
    assert Nvcc(tmp_path, version).chosen("1") == ("8.0 8.6 8.9 9.0 10.0 12.0+PTX", "")


@pytest.mark.parametrize(
    ("version", "archs", "kept", "dropped"),
    [("13.0", "7.0 7.5 9.0", "7.5 9.0", "7.0"), ("12.8", "6.1;7.0;8.0+PTX", "7.0 8.0+PTX", "6.1")],
)
def test_older_gpus_in_a_list_are_left_out(tmp_path, version, archs, kept, dropped):
    found, said = Nvcc(tmp_path, version).chosen(archs=archs)
    assert found == kept
    assert f"nvcc {version} cannot compile the kernels for {dropped}: " in said


def test_no_gpu_of_the_list_is_left(tmp_path):
    found, said = Nvcc(tmp_path, "13.0").chosen(archs="7.0")
    assert found == "nvcc 13.0 cannot compile the kernels for 7.0 (TORCH_CUDA_ARCH_LIST says for what)"
    assert said == f"mtlfast: no CUDA kernels are built, as {found}"


def test_the_static_runtime_is_looked_for_where_nvcc_links_from(tmp_path):
    nvcc = Nvcc(tmp_path, "13.0")
    archive = nvcc.home / "lib64" / "libcudart_static.a"
    (tmp_path / "elsewhere").mkdir()
    archive.rename(tmp_path / "elsewhere" / archive.name)
    assert nvcc.chosen("1")[1] == ""
    (tmp_path / "elsewhere" / archive.name).unlink()
    assert nvcc.chosen()[0] == (
        f"{tmp_path} holds no libcudart_static.a, which the extension links (PyPI: nvidia-cuda-runtime)"
    )


def test_what_is_no_nvcc_is_named(tmp_path):
    nvcc = Nvcc(tmp_path, "13.0")
    nvcc.path.write_text("#!/bin/sh\nexit 1\n")
    assert nvcc.chosen()[0] == f"{nvcc.path} --version names no version, expected a CUDA compiler"


def test_gpus_of_one_generation_share_their_ptx():
    code = "import toolkit; print(*toolkit.gencode(['7.5', '8.6', '8.0', '9.0', '9.0a', '10.0', '12.0+PTX']))"
    assert python(code, CHECKOUT / "csrc").stdout.split() == [
        "-gencode=arch=compute_75,code=sm_75",
        "-gencode=arch=compute_80,code=sm_86",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


SETUP = "import runpy, sys; sys.argv[1:] = ['--version']; setup = runpy.run_path('setup.py'); "


def test_warnings_are_errors_where_the_makefile_says_so_alone():
    ask = SETUP + "print(*setup['CXX_FLAGS'], *setup['NVCC_FLAGS'], *setup['extension']().extra_compile_args)"
    assert "-Werror" not in python(ask, CHECKOUT).stdout
    flags = python(ask, CHECKOUT, MTLFAST_WERROR="1").stdout.split()
    assert flags.count("-Werror") == 2
    assert "--Werror=all-warnings" in flags


NINJA = """
rule run
  command = $what
  description = $name
build one: run
  what = echo a compiler warns
  name = cxx one
build two: run one
  what = true
  name = nvcc two
build three: run two
  what = echo error: no && false
  name = nvcc three
"""


def test_a_build_says_how_far_it_is(tmp_path):
    (tmp_path / "build.ninja").write_text(NINJA)
    run = python(SETUP + f"setup['run_ninja'](['-C', {str(tmp_path)!r}])", CHECKOUT)
    first, second, _, last = run.stderr.splitlines()
    assert first.startswith("mtlfast: [1 of 3, ")
    assert first.endswith("] cxx one")
    assert second.startswith("mtlfast: [2 of 3, ")
    assert second.endswith("] nvcc two")
    assert {"a compiler warns", "error: no"} <= set(run.stdout.splitlines())
    assert run.returncode == 1
    assert last.startswith("mtlfast: a kernel does not compile; MTLFAST_CUDA=0 leaves out CUDA")
