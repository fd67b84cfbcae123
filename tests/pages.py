"""The Python code in README.md and docs/, by page and by name; and a way to run one block of it.

A block of Python has a name: its first line is three backticks, `python` and the name. A block with the line
`import torch` is a whole program. Every other block runs after the block `setup` of docs/recipes.md, which makes a
small model, two tasks and an optimizer, and finds the losses of its data in `losses`. Blocks of other languages, shell
commands for instance, are not run.
"""

import re
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RECIPES = "docs/recipes.md"


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def pages() -> list[str]:
    """README.md and every page of docs/, as paths from the repository's root; none outside of a checkout."""
    found = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path.relative_to(ROOT).as_posix() for path in found if path.exists()]


def prose(page: str) -> str:
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)


def blocks(page: str, language: str = "python") -> list[tuple[str, str]]:
    """(name, code) of each block in one language; a block without a name has an empty one."""
    found = re.findall(rf"^```{language}\b *(\S*)\n(.*?)^```$", text_of(page), re.DOTALL | re.MULTILINE)
    return [(name, code) for name, code in found]


SNIPPETS = {(page, name): code for page in pages() for name, code in blocks(page)}


class Snippet:
    """A block of a page. `names` is what it and the setup define; `change` replaces some of the block's text."""

    def __init__(self, page: str, name: str, change: tuple[str, str] | None = None) -> None:
        self.title, self.code, self.names = f"{page}: {name}", SNIPPETS[page, name], dict[str, Any]()
        if change is not None:
            assert change[0] in self.code
            self.code = self.code.replace(*change)
        if "import torch" not in self.code.splitlines():
            self._execute(SNIPPETS[RECIPES, "setup"], f"{RECIPES}: setup")
            self.names["losses"] = self.losses_of(self.data)

    def __getattr__(self, name: str) -> Any:
        return self.names[name]

    def _execute(self, code: str, title: str) -> None:
        exec(compile(code, title, "exec"), self.names)

    def run(self) -> "Snippet":
        self._execute(self.code, self.title)
        return self

    def loss(self) -> float:
        """The sum of the setup's losses as the model is now."""
        return sum(self.losses_of(self.data)).item()

    def parameters(self) -> torch.Tensor:
        """All parameters of the setup's model, [P]."""
        return torch.cat([p.detach().flatten() for p in [*self.trunk.parameters(), *self.heads.parameters()]])
