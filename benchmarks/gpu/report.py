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


def render(results: dict[str, Any]) -> str:
    """The whole report: the steps, the rows of each step, and the output of steps that failed."""
    steps = results["steps"]
    parts = [
        "# mtlfast on a GPU",
        table([{"step": s["name"], "status": s["status"], "s": s["seconds"]} for s in steps]),
    ]
    for step in steps:
        result = step["result"]
        if isinstance(result, list) and result:
            parts += [f"## {step['name']}", table(result)]
        elif isinstance(result, dict):
            parts += [f"## {step['name']}", tests(result)]
        if step["status"] != "ok" and step["output"]:
            parts += [f"## {step['name']}: how it ended", f"```\n{step['output'][-2000:].strip()}\n```"]
    return "\n\n".join(parts) + "\n"
