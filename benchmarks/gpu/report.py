"""The GPU kit's results as a page."""

from typing import Any


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of any keys as a Markdown table, in the order in which keys appear."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(str(row.get(key, "")) for key in keys) + " |" for row in rows]
    return "\n".join(lines)


def tests(result: dict[str, Any]) -> str:
    """The counts of a pytest run, and the tests that failed."""
    lines = [f"{result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped."]
    lines += [f"- {failure['test']}: {failure['why']}" for failure in result["failures"]]
    return "\n".join(lines)


def reached(results: dict[str, Any]) -> str:
    """How far the run came, in a sentence for each kind of ending."""
    steps = results["steps"]
    groups: dict[str, list[str]] = {}
    for step in steps:
        groups.setdefault(step["status"].split(" (")[0], []).append(step["name"])
    ended = {step["name"] for step in steps}
    groups["not reached"] = [name for name in results["plan"] if name not in ended] + groups.pop("skipped", [])
    well = groups.pop("ok", [])
    lines = [f"{len(well)} of {len(results['plan'])} steps ended well: {', '.join(well) or 'none'}."]
    lines += [f"{status[0].upper()}{status[1:]}: {', '.join(names)}." for status, names in groups.items() if names]
    return "\n".join(lines)


def render(results: dict[str, Any]) -> str:
    """The whole report: the steps, the rows of each step, and the output of steps that failed."""
    steps = results["steps"]
    parts = [
        "# mtlfast on a GPU",
        reached(results),
        table([{"step": s["name"], "status": s["status"], "s": s["seconds"]} for s in steps]),
    ]
    for step in steps:
        result = step["result"]
        if isinstance(result, list) and result:
            parts += [f"## {step['name']}", table(result)]
        elif isinstance(result, dict):
            parts += [f"## {step['name']}", tests(result)]
        if step["status"] not in ("ok", "running") and step["output"]:
            parts += [f"## {step['name']}: how it ended", f"```\n{step['output'][-2000:].strip()}\n```"]
    return "\n\n".join(parts) + "\n"
