"""The pages that list the files for a new method or op name the same files as mention an existing one."""

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from mtlfast import aggregation, training, weighting

ROOT = Path(__file__).parents[1]
if not (ROOT / "csrc").is_dir():
    pytest.skip("needs the checkout", allow_module_level=True)

# Pages and tests may mention a method as an example, which no list asks for.
SPEAKS = re.compile(r".*\.md|tests/(.*/)?test_\w+\.py")

METHODS_PAGE = ("docs/add-a-method.md", "# Adding a Gram aggregator")
WEIGHTINGS_PAGE = ("docs/add-a-method.md", "# Adding a loss weighting")
OPS_PAGE = ("csrc/README.md", "## A new op is five steps")

# What is looked for, the page and the section, and what stands for <method>, <family> and <op> there.
CASES = {
    "Krum": (r"krum(weighting)?", METHODS_PAGE, "krum"),
    "PCD": (r"pcd(weighting)?", METHODS_PAGE, "pcd"),
    "AlignedMTL": (r"aligned_?mtl(weighting)?", METHODS_PAGE, "aligned_mtl"),
    "GO4Align": (r"go4align", WEIGHTINGS_PAGE, "go4align"),
    "STCH": (r"stch", WEIGHTINGS_PAGE, "scalarizations"),
    # "scale" alone is a word like any other: these are the op, its kernel, and its functions in C++. Code that calls an
    # op is not where the op is entered.
    "scale_": (
        r"(?<!ops\.)scale_(?!\w)|scale_kernel|scale\.cuh?|cuda::scale(?=\()|void scale(?=\()|char\* scale(?=\()"
        r"|\(\*scale\)",
        OPS_PAGE,
        "scale",
    ),
}


@cache
def files() -> dict[str, str]:
    """The checkout's files by path: those that git tracks, or, without git, those that .gitignore does not name."""
    git = ["git", "--git-dir", str(ROOT / ".git"), "ls-files"]
    found = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False) if shutil.which("git") else None
    if found is not None and found.returncode == 0:
        paths = found.stdout.splitlines()
    else:
        ignored = [".git", *(line.strip("/") for line in (ROOT / ".gitignore").read_text().split())]
        every = (path.relative_to(ROOT) for path in ROOT.rglob("*"))
        paths = [p.as_posix() for p in every if not any(part.match(x) for part in (p, *p.parents) for x in ignored)]
    return {
        path: (ROOT / path).read_bytes().decode("utf-8", errors="replace") for path in paths if (ROOT / path).is_file()
    }


def section(page: str, heading: str) -> str:
    level = heading.split()[0]
    _, _, rest = files()[page].partition(f"{heading}\n")
    assert rest, f"{page} has no section {heading!r}"
    return re.split(rf"^{level} ", rest, flags=re.MULTILINE)[0]


def places(page: str, heading: str, stem: str) -> tuple[set[str], set[str]]:
    """The files that a section's list says a method is entered in: always, and under a condition."""
    listed = re.findall(r"^    (\S+) +\d(, if .+)?$", section(page, heading), re.MULTILINE)
    paths = [(re.sub(r"<\w+>", stem, path), condition) for path, condition in listed]
    return {p for p, condition in paths if not condition}, {p for p, condition in paths if condition}


def naming(pattern: str, texts: dict[str, str]) -> set[str]:
    found = re.compile(rf"(?<![^\W_])({pattern})(?![^\W_])", re.IGNORECASE)
    return {path for path, text in texts.items() if found.search(text)}


def unlisted(name: str, texts: dict[str, str]) -> set[str]:
    """The files that mention it although the page does not list them."""
    pattern, page, stem = CASES[name]
    always, sometimes = places(*page, stem)
    return {path for path in naming(pattern, texts) - always - sometimes if not SPEAKS.fullmatch(path)}


@pytest.mark.parametrize("name", CASES)
def test_the_page_names_every_file_that_a_method_is_entered_in(name):
    pattern, page, stem = CASES[name]
    always, sometimes = places(*page, stem)
    assert len(always) >= 4
    assert always | sometimes <= files().keys()
    assert always - naming(pattern, files()) == set(), f"{page[0]} sends one there for nothing"
    assert unlisted(name, files()) == set(), f"{page[0]} does not list them"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("path", ["Makefile", "mtlfast/ops/_check.py", "tests/cases.py", "csrc/task_table.h"])
def test_a_name_in_another_file_is_found(name, path):
    planted = {**files(), path: f"{files()[path]}\n{name}"}
    assert unlisted(name, planted) - unlisted(name, files()) == {path}


def test_every_step_of_the_list_is_a_step_of_the_page():
    for page in (METHODS_PAGE, WEIGHTINGS_PAGE, OPS_PAGE):
        text = section(*page)
        steps = re.findall(r"^(\d)\. \*\*", text, re.MULTILINE)
        assert steps == [str(n + 1) for n in range(len(steps))]
        assert set(re.findall(r"^    \S+ +(\d)", text, re.MULTILINE)) == set(steps), page


def listed_in_the_readme(module: str) -> set[str]:
    """The classes and functions that README's item about a module names in code."""
    (item,) = re.findall(rf"^- `{re.escape(module)}`(.*?)(?=^- |^\S|\Z)", files()["README.md"], re.M | re.S)
    return {name for code in re.findall(r"`([^`]+)`", item) for name in re.findall(r"\b[A-Z]\w+|^[a-z]\w+$", code)}


def test_the_readme_names_every_aggregator():
    every = {method.__name__ for methods in aggregation.FAMILIES.values() for method in methods}
    assert listed_in_the_readme("mtlfast.aggregation") == every


def test_what_the_readme_names_is_there():
    named = listed_in_the_readme("mtlfast.weighting") - {"None", "PCGrad"}
    assert named >= {"DWA", "UW"}
    assert named <= set(weighting.__all__)
    assert listed_in_the_readme("mtlfast.training") == set(training.__all__)
