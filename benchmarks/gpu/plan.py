"""The steps of the GPU kit in their order: what decides most comes first, so that four minutes are worth having."""

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass
class Step:
    """A command, and how many seconds it may take. RESULT in it is where it writes its JSON, if it does."""

    name: str
    seconds: float
    command: Sequence[str]
    env: dict[str, str] = field(default_factory=dict)


def program(name: str, seconds: float, *words: str, dry: bool = False, env: dict[str, str] | None = None) -> Step:
    """A step that is a file of this folder."""
    command = [sys.executable, str(HERE / words[0]), *words[1:], "RESULT", *(["--dry"] if dry else [])]
    return Step(name, seconds, command, env or {})


def sanitizer(tool: str, seconds: float) -> Step:
    """compute-sanitizer over a small set of tests."""
    tests = ["tests/test_gram.py", "tests/test_combine.py", "tests/test_solve.py"]
    tests += ["-m", "cuda", "-k", "mixed or project"]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", *tests]
    return Step(tool, seconds, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def suite(seconds: float) -> Step:
    """Every test that wants a GPU, in four processes where pytest-xdist is there."""
    command = [sys.executable, "-m", "pytest", "tests", "-m", "cuda", "--tb=short"]
    command += ["-p", "outcomes", "--outcomes", "RESULT"]
    command += ["--continue-on-collection-errors"]  # a test file may want a package that this machine lacks
    if importlib.util.find_spec("xdist"):
        command += ["-n", "4"]
    return Step("tests", seconds, command, {"MTLFAST_GRID": "all"})


def decisive(dry: bool = False) -> list[Step]:
    """The first four minutes, where a build was carried here: their limits say so."""
    return [
        program("device", 30, "measure.py", "device", dry=dry),
        program("build", 200, "extension.py", dry=dry),  # seconds, unless it must compile
        program("bandwidth", 15, "measure.py", "bandwidth", dry=dry),
        # It says who serves, which an error would hide.
        program("smoke", 45, "measure.py", "smoke", dry=dry, env={"MTLFAST_REQUIRE_NATIVE": "0"}),
        program("sizes", 35, "measure.py", "sizes", dry=dry),
        program("step", 25, "measure.py", "step", dry=dry),
        program("capture", 15, "measure.py", "capture", dry=dry),
        program("solvers", 25, "measure.py", "solvers", dry=dry),
        program("profiles", 40, "measure.py", "profiles", dry=dry),
    ]


def thorough(dry: bool = False) -> list[Step]:
    """What is done with the time that is left."""
    return [
        program("fallback", 25, "measure.py", "fallback", dry=dry),
        program("ranks", 45, "measure.py", "ranks", dry=dry),
        suite(180),
        program("ops", 90, "measure.py", "ops", dry=dry),
        program("models", 40, "measure.py", "models", dry=dry),
        sanitizer("memcheck", 50),
        program("peers", 50, "measure.py", "peers", dry=dry),
    ]


def on_request(dry: bool = False) -> list[Step]:
    """What runs only where `--only` names it."""
    return [
        sanitizer("racecheck", 100),
        sanitizer("initcheck", 100),
        program("compiled", 60, "measure.py", "compiled", dry=dry),
    ]


def steps(only: Sequence[str] = (), dry: bool = False) -> list[Step]:
    """The steps of a run, in order: those named, or all but those on request."""
    if only:
        return [step for step in (*decisive(dry), *thorough(dry), *on_request(dry)) if step.name in only]
    return [*decisive(dry), *thorough(dry)]


def names() -> list[str]:
    """Of every step, in order."""
    return [step.name for step in (*decisive(), *thorough(), *on_request())]
