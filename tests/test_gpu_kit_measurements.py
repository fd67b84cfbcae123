"""What the GPU kit's steps do, on the CPU: measure, find planted faults, take a carried extension if it fits."""

import json
import os
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch

from mtlfast import TaskGradients, _native, ops
from mtlfast.bench.workload import scattered

KIT = Path(__file__).parents[1] / "benchmarks" / "gpu"
if not KIT.exists():
    pytest.skip("needs the checkout", allow_module_level=True)
sys.path.insert(0, str(KIT))
import extension  # noqa: E402
import measure  # noqa: E402
import op_times  # noqa: E402
import profiles  # noqa: E402
import smoke  # noqa: E402
import training  # noqa: E402
from report import render  # noqa: E402
from workloads import DRY  # noqa: E402

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
OPS = [
    "gram, exact",
    "gram, fast",
    "gram of groups, exact",
    "gram of groups, fast",
    "cross-Gram",
    "norms",
    "norms of groups",
    "combine",
    "combine, R = 3",
    "combine groups",
    "accumulate",
    "flatten",
    "scale_",
    "advance_",
    "excess_risks",
    "project",
]
OPS += ["grad_drop", "trimmed_mean"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile itself
@pytest.mark.parametrize("name", [name for name in measure.MEASUREMENTS if name not in ("smoke", "fallback")])
def test_measurements_run_on_the_cpu(name):
    rows = list(measure.MEASUREMENTS[name](DRY))
    assert rows
    step = {"name": name, "status": "ok", "seconds": 1, "output": "", "result": rows}
    assert "nan" not in render({"plan": [name], "steps": [step]})
    if name == "ops":
        assert {(row["K"], row["dtype"], row["layout"]) for row in rows} == {
            (8, "float32", "40 tensors"),
            *((K, x, lie) for K in (2, 32) for x in ("float32", "bfloat16") for lie in ("scattered", "matrix")),
        }
        assert all(row["% of copy"] > 0 for row in rows)
        assert {"combine, accumulate", "PCGrad by tensor"} <= {row["op"] for row in rows}
        assert {row["op"] for row in rows if "plain takes" not in row} >= {"PCGrad by tensor"}
    if name == "models":
        assert {row["op"] for row in rows if "plain takes" in row} >= {"PCGrad", "PCGrad by tensor"}
    if name == "sizes":
        assert [row["op"] for row in rows] == ["gram", "combine", "PCGrad"] * len(DRY.sizes)
    if name == "solvers":  # all methods before more tasks
        assert [row["K"] for row in rows] == sorted(row["K"] for row in rows)


def test_an_output_left_unwritten_is_noticed(monkeypatch):
    grads = scattered(2, 1000, num_tensors=5)
    op_times.check_outputs(grads)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "combine", lambda *args, **kwargs: None)
        with pytest.raises(AssertionError, match="combine with a weight of 2"):
            op_times.check_outputs(grads)
    monkeypatch.setattr(ops, "gram", lambda grads: torch.full((2, 2), torch.nan))
    with pytest.raises(AssertionError, match="gram of the first and the last task is off by nan"):
        op_times.check_outputs(grads)


@pytest.mark.native
def test_the_smoke_covers_every_op_task_number_dtype_and_alignment():
    who, *rows = smoke.smoke(DRY)
    assert who == {"served by": "kernels", "why": ""}
    cases = [row for row in rows if "dtype" in row]
    assert {(row["K"], row["dtype"], row["layout"]) for row in cases if row["T"] == smoke.FEW} == {
        (K, x, lie) for K in (2, 8, 16, 33, 70) for x in ("float32", "bfloat16") for lie in ("aligned", "misaligned")
    }
    assert {row["dtype"] for row in cases if row["T"] == DRY.many} == {"float32", "bfloat16"}
    assert all(list(row)[4:] == OPS for row in cases)
    assert [row["K"] for row in rows if "solve" in row] == [2, 8, 16, 33, 70]


def test_misaligned_is_one_element_off_and_aligned_is_not():
    for dtype in smoke.DTYPES:
        grads = scattered(2, 1000, dtype, num_tensors=5)
        places = {name: {place(g).data_ptr() % 16 for g in grads.flat()} for name, place in smoke.LAYOUTS.items()}
        assert places == {"aligned": {0}, "misaligned": {dtype.itemsize}}


def without_an_element(grads: TaskGradients) -> TaskGradients:
    rows = [[None if g is None else g.clone() for g in row] for row in grads.rows]
    rows[0][-1][-1] = 0
    return TaskGradients.from_rows(rows)


# What is planted -> the op in whose place it stands, what it does with the right one, and the figures that show it.
FAULTS = {
    "an element left out": (
        "gram",
        lambda op: lambda g, *other, **k: op(without_an_element(g), *other, **k),
        ["gram, exact", "gram, fast", "gram of groups, exact", "gram of groups, fast", "cross-Gram"],
    ),
    "a sum in float": (
        "gram",
        lambda op: lambda *batches, **k: op(*batches, **{**k, "precision": "fast"}),
        ["gram, exact", "gram of groups, exact", "cross-Gram"],
    ),
    "batches exchanged": ("gram", lambda op: lambda g, *other, **k: op(*other, g, **k), ["cross-Gram"]),
    "norms of other tasks": (
        "norms",
        lambda op: lambda g, **k: op(g, **k).flip(-1),
        ["norms", "norms of groups"],
    ),
    "matrices of other groups": (
        "gram",
        lambda op: lambda *a, **k: op(*a, **k).roll(1, 0) if "groups" in k else op(*a, **k),
        ["gram of groups, exact", "gram of groups, fast"],
    ),
    "norms of other groups": (
        "norms",
        lambda op: lambda g, **k: op(g, **k).roll(1, 0) if k else op(g),
        ["norms of groups"],
    ),
    "weights of other groups": (
        "combine",
        lambda op: lambda g, w, out=None, **k: op(g, w.roll(1, 0) if "groups" in k else w, out=out, **k),
        ["combine groups"],
    ),
    "nothing written": ("combine", lambda op: lambda g, w, out=None, **k: out or op(g, w), ["combine", "accumulate"]),
    "overwritten": (
        "combine",
        lambda op: lambda g, w, out=None, accumulate=False, **k: op(g, w, out=out, **k),
        ["accumulate"],
    ),
    "columns exchanged": ("flatten", lambda op: lambda g: op(g).flip(1), ["flatten"]),
    "views exchanged": ("unflatten", lambda op: lambda v, g: op(v.flip(0), g), ["flatten"]),
    "scaled twice": ("scale_", lambda op: lambda g, w: op(op(g, w), w), ["scale_"]),
    "another order": ("project", lambda op: lambda g: op(g, descending(g)), ["project"]),
    "both signs": ("grad_drop", lambda op: lambda g, *a: ops.combine(g, torch.ones(g.num_tasks)), ["grad_drop"]),
    "nothing left out": ("trimmed_mean", lambda op: lambda g, n: op(g, 0), ["trimmed_mean"]),
    "an error": ("norms", lambda op: lambda g, **k: op(None), ["norms", "norms of groups"]),
}


def descending(grads: TaskGradients) -> torch.Tensor:
    K = grads.num_tasks
    return torch.tensor([[j for j in reversed(range(K)) if j != i] for i in range(K)])


@pytest.mark.native
@pytest.mark.parametrize("fault", FAULTS)
def test_the_smoke_finds_a_planted_fault(fault, monkeypatch):
    name, plant, found = FAULTS[fault]
    monkeypatch.setattr(smoke.ops, name, plant(getattr(ops, name)))
    row = smoke.row_on(DRY, 8, torch.float32, "misaligned", smoke.FEW)
    bad = {op for op in OPS if not smoke.passed(row[op])}
    assert set(found) <= bad <= {*found, *(op for op in OPS if op.startswith("combine") and "combine" in found)}
    with pytest.raises(AssertionError, match=f"(?s)larger errors than allowed:.*{found[0]} at "):
        list(smoke.judged(iter([row])))


@pytest.mark.native
def test_the_smoke_finds_a_solver_that_differs(monkeypatch):
    solve, calls = ops.solve, []

    def every_second_is_off(*arguments):
        calls.append(arguments)
        return solve(*arguments) * (1 + 1e-5 * (len(calls) % 2))

    monkeypatch.setattr(smoke.ops, "solve", every_second_is_off)
    figures = {method: smoke.outcome(check) for method, check in smoke.check_solves(8, "cpu").items()}
    assert "UPGrad" in figures
    assert not any(map(smoke.passed, figures.values()))


def test_who_serves(monkeypatch):
    def reference(device: torch.device) -> bool:
        warnings.warn("no machine code for it; the reference runs", RuntimeWarning, stacklevel=2)
        return False

    def refused(device: torch.device) -> bool:
        raise ImportError("MTLFAST_REQUIRE_NATIVE is set, but there is no machine code")

    def no_image(grads: TaskGradients) -> None:
        raise RuntimeError("norms: no kernel image is available\nand more")

    monkeypatch.setattr(_native, "serves", reference)
    who = smoke.who_serves("cpu")
    assert who["served by"] == "reference"
    assert who["why"].startswith("no machine code for it; the reference runs")
    monkeypatch.setattr(_native, "serves", refused)
    assert smoke.who_serves("cpu") == {
        "served by": "neither",
        "why": "MTLFAST_REQUIRE_NATIVE is set, but there is no machine code",
    }
    monkeypatch.setattr(_native, "serves", lambda device: True)
    monkeypatch.setattr(smoke.ops, "norms", no_image)
    assert smoke.who_serves("cpu") == {"served by": "neither", "why": "norms: no kernel image is available"}


def test_where_the_reference_serves_the_smoke_checks_it_and_fails(monkeypatch):
    monkeypatch.setattr(smoke, "TASKS", (2,))
    monkeypatch.setattr(smoke, "who_serves", lambda device: {"served by": "reference", "why": "too old a GPU"})
    rows = smoke.smoke(DRY)
    kept = [next(rows) for _ in range(8)]
    assert smoke.passed(kept[1]["gram, exact"])
    with pytest.raises(AssertionError, match=r"^cpu is served by reference: too old a GPU$"):
        next(rows)


def test_the_fallback_runs_the_reference(monkeypatch):
    asked = []
    monkeypatch.setattr(
        smoke.reference,
        "norms",
        lambda grads, *more, norms=smoke.reference.norms, **named: asked.append(1) or norms(grads, *more, **named),
    )
    rows = list(smoke.fallback(DRY))
    assert asked
    assert {row["K"] for row in rows} == {2, 8, 33}
    if _native.C is not None:
        assert _native.serves(torch.device("cpu"))  # afterwards as before


def test_a_replay_that_differs_is_noticed():
    values = torch.ones(3)
    result = values.clone()
    assert training.replays_like_eager(lambda: result.copy_(values), lambda: values, result) == "yes"
    assert training.replays_like_eager(lambda: None, lambda: values, result) == "no"
    assert training.replays_like_eager(lambda: result.copy_(values + 1e-6), lambda: values, result) == "no"


def test_a_capture_that_fails_is_a_row(monkeypatch):
    monkeypatch.setattr(training.ops, "combine", lambda *args, **kwargs: 1 / 0)
    rows = training.capture_cold(DRY)
    assert [next(rows)["replay equals eager"][:12] for _ in range(4)] == ["yes", "yes", "ZeroDivision", "ZeroDivision"]
    with pytest.raises(AssertionError, match="combine: ZeroDivisionError: division by zero; surgery: ZeroDivision"):
        next(rows)


KERNEL = "void mtlfast::cuda::gram_staged_kernel<float, 32, float>"
NCU = f"""#!/bin/sh
echo '==PROF== Connected to process 1'
echo '"ID","Kernel Name","Context","Section Name","Metric Name","Metric Unit","Metric Value","Rule Name"'
echo '"0","{KERNEL}(Table, Sums)","1","Occupancy","Achieved Occupancy","%","24.8",""'
echo '"0","{KERNEL}(Table, Sums)","1","Occupancy","","","","AchievedOccupancy"'
echo '==PROF== Disconnected from process 1'
"""


def test_counters_are_read_from_what_ncu_prints(monkeypatch, tmp_path):
    ncu = tmp_path / "ncu"
    ncu.write_text(NCU)
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    wanted = {"of": "ncu", "kernel": KERNEL, "counter": "Achieved Occupancy", "value": "24.8 %"}
    assert list(profiles.counters()) == [wanted]
    ncu.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM' >&2; exit 1\n")
    assert list(profiles.counters()) == [{"of": "ncu", "kernel": "none: ==ERROR== ERR_NVGPUCTRPERM"}]


def test_kernels_are_read_from_the_profilers_trace():
    args = {"registers per thread": 168, "shared memory": 35844, "grid": [132, 1, 1], "block": [256, 1, 1], "stream": 7}
    events = [
        {"cat": "kernel", "name": "void solve_kernel(Groups)", "dur": 12.5, "args": args},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 3, "args": {}},
    ]

    class Profiler:
        def export_chrome_trace(self, path: str) -> None:
            Path(path).write_text(json.dumps({"traceEvents": events}))

    assert list(profiles.kernels("UPGrad", Profiler(), "kernel")) == [
        {
            "of": "UPGrad",
            "kernel": "void solve_kernel",
            "us": 12.5,
            "grid": "[132, 1, 1]",
            "block": "[256, 1, 1]",
            "registers": "168",
            "shared bytes": "35844",
        }
    ]


# Architectures of a build, a GPU's capability -> does it run there?
@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["9.0"], (9, 0), True),
        (["8.0"], (8, 6), True),  # machine code runs on later GPUs of its major version
        (["8.6"], (8, 0), False),
        (["9.0"], (10, 0), False),
        (["8.0", "9.0+PTX"], (12, 0), True),  # which the driver compiles
        (["12.0+PTX"], (9, 0), False),
        ([], (9, 0), False),
    ],
)
def test_which_architectures_run_on_which_gpu(archs, capability, runs):
    assert extension.runs_on(archs, capability) == runs


def build(folder: Path, **facts: object) -> None:
    """As a build would leave it, with its name in place of the code."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"_C{SUFFIX}").write_text(folder.name)
    known = {"torch": torch.__version__, "cuda_archs": ["9.0"], "commit": "abc1234", **facts}
    (folder / "_build.json").write_text(json.dumps(known))


@pytest.fixture
def checkout(tmp_path):
    """A package whose extension loads unless it says otherwise, and a setup.py that says how it was called."""
    package = tmp_path / "mtlfast"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "_native.py").write_text(
        "from pathlib import Path\n"
        f"library = Path(__file__).with_name({f'_C{SUFFIX}'!r})\n"
        "REASON = '' if library.exists() and library.read_text() != 'broken' else 'it does not load'\n"
    )
    (tmp_path / "setup.py").write_text(
        "import json, os, torch\n"
        f"open({f'mtlfast/_C{SUFFIX}'!r}, 'w').write('compiled')\n"
        "facts = {'torch': torch.__version__, 'cuda_archs': [os.environ['TORCH_CUDA_ARCH_LIST']]}\n"
        "json.dump({**facts, 'commit': os.environ['MTLFAST_CUDA']}, open('mtlfast/_build.json', 'w'))\n"
    )
    return tmp_path


def test_an_extension_that_fits_is_taken_where_it_lies(checkout):
    build(checkout / "mtlfast")
    assert list(extension.provide(checkout, (9, 0))) == [
        {
            "extension": "carried in mtlfast",
            "torch": torch.__version__,
            "architectures": "9.0",
            "commit": "abc1234",
        }
    ]


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"torch": "2.9.1+cu130"}, "is for torch 2.9.1+cu130, this is "),
        ({"cuda_archs": ["8.0"]}, "is for 8.0, this GPU is 9.0"),
        ({"cuda_archs": []}, "is for no GPU, this GPU is 9.0"),
    ],
)
def test_one_that_does_not_fit_is_replaced_by_a_carried_one(facts, why, checkout):
    build(checkout / "mtlfast", **facts)
    build(checkout / "build" / "carry" / "py312", commit="carried")
    refused, taken = extension.provide(checkout, (9, 0))
    assert refused["extension"] == "not from mtlfast"
    assert refused["why"].startswith(why)
    assert taken["extension"] == "carried in build/carry/py312"
    assert (checkout / "mtlfast" / f"_C{SUFFIX}").read_text() == "py312"
    assert json.loads((checkout / "mtlfast" / "_build.json").read_text())["commit"] == "carried"


def test_without_one_it_is_compiled_for_this_gpu_alone(checkout):
    other = checkout / "build" / "carry"
    build(other)
    (other / f"_C{SUFFIX}").rename(other / "_C.cpython-39-other.so")  # of another Python
    build(checkout / "build" / "carry-old", torch="2.0.0")
    build(checkout / "build" / "carry-z")
    (checkout / "build" / "carry-z" / f"_C{SUFFIX}").write_text("broken")
    *refused, compiled = extension.provide(checkout, (9, 0))
    whys = {row["extension"].removeprefix("not from "): row["why"] for row in refused}
    assert list(whys) == ["mtlfast", "build/carry", "build/carry-old", "build/carry-z"]
    assert whys["mtlfast"] == "has no _build.json"
    assert whys["build/carry"] == f"has no _C{SUFFIX}"
    assert whys["build/carry-old"].startswith("is for torch 2.0.0")
    assert whys["build/carry-z"] == "it does not load"
    assert compiled["extension"] == "compiled"
    assert (compiled["architectures"], compiled["commit"]) == ("9.0", "1")  # MTLFAST_CUDA=1


def test_on_the_cpu_nothing_is_compiled(checkout):
    with pytest.raises(RuntimeError, match="no extension fits, and without a GPU none is compiled"):
        list(extension.provide(checkout, None))
    build(checkout / "mtlfast", cuda_archs=[])
    assert [row["extension"] for row in extension.provide(checkout, None)] == ["carried in mtlfast"]
