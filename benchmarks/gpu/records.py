"""Files that whoever reads them finds whole, however suddenly the writer ends."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """The old file until the new one is complete."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text)
    draft.replace(path)


def short(value: Any) -> Any:
    """A number as one reads it: two decimals, or three digits if it is below 1."""
    if not isinstance(value, float) or not math.isfinite(value):
        return value
    return round(value, 2) if abs(value) >= 1 else float(f"{value:.3g}")


def record(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Writes the rows so far, as JSON, after every one."""
    kept = []
    for row in rows:
        kept.append({key: short(value) for key, value in row.items()})
        write_whole(path, json.dumps(kept))
