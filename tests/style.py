"""Counts what makes code hard to read, and fails where there is too much of it: `python tests/style.py`."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EMPTY_NAMES = {"found", "kept", "told", "said", "figures"}  # they do not say what they hold
LONG_BODY = 15
# Objectives that may be longer, and why.
LONGER = {
    "objectives/online/rpg.py": "one paper with four divergences, two estimators, two anchors"
}

# figure -> the most that is allowed
LIMITS = {
    "long functions without a blank line or a comment, percent": 20,
    "95th percentile of line width": 100,
    "assignments of a tuple to a tuple": 60,
    "variables with an empty name": 0,
    "files over 400 lines": 0,
    "functions over 60 lines": 0,
    "objectives over 90 lines of code": 0,
}


def measure(root: Path) -> tuple[dict[str, float], list[str]]:
    """The figures of LIMITS for the package at `root`, and the places behind them."""
    places: list[str] = []
    widths: list[int] = []
    counts = dict.fromkeys(LIMITS, 0.0)
    long_bodies = dense_bodies = 0

    for path in sorted(root.rglob("*.py")):
        text = path.read_text()
        lines = text.splitlines()
        name = path.relative_to(root)
        widths += [len(line) for line in lines if line.strip()]

        if len(lines) > 400:
            counts["files over 400 lines"] += 1
            places.append(f"{name}: {len(lines)} lines")
        limited = _is_objective(name) and str(name) not in LONGER
        if limited and _lines_of_code(text) > 90:
            counts["objectives over 90 lines of code"] += 1
            places.append(f"{name}: {_lines_of_code(text)} lines of code, an objective")

        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > 60:
                    counts["functions over 60 lines"] += 1
                    places.append(f"{name}:{node.lineno} {node.name}: {length} lines")
                body = _body_lines(node, lines)
                if len(body) >= LONG_BODY:
                    long_bodies += 1
                    if not any(not line.strip() or line.strip().startswith("#") for line in body):
                        dense_bodies += 1
                        places.append(f"{name}:{node.lineno} {node.name}: dense")
            elif _assigns_tuples(node):
                counts["assignments of a tuple to a tuple"] += 1
                places.append(f"{name}:{node.lineno}: a tuple to a tuple")
            elif _stores_an_empty_name(node):
                counts["variables with an empty name"] += 1
                places.append(f"{name}:{node.lineno}: a variable named {node.id}")

    widths.sort()
    counts["95th percentile of line width"] = widths[int(0.95 * len(widths))]
    counts["long functions without a blank line or a comment, percent"] = round(
        100 * dense_bodies / max(1, long_bodies), 1
    )
    return counts, places


def _is_objective(name: Path) -> bool:
    return name.parts[0] == "objectives" and len(name.parts) == 3 and name.stem != "__init__"


def _lines_of_code(text: str) -> int:
    """Lines without blank ones, comments and docstrings: room is never what a limit should cost."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in documented
        for number, line in enumerate(text.splitlines(), start=1)
    )


def _body_lines(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> list[str]:
    """The lines of a function's body without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) else node.body
    if not body:
        return []
    return lines[body[0].lineno - 1 : node.end_lineno]


def _stores_an_empty_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in EMPTY_NAMES


def _assigns_tuples(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
    )


def main() -> int:
    """Print the figures beside their limits, and the places where a limit is passed."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "alignkit"
    counts, places = measure(root)
    for figure, limit in LIMITS.items():
        print(f"{counts[figure]:>6g}  (at most {limit})  {figure}")
    passed = all(counts[figure] <= limit for figure, limit in LIMITS.items())
    if not passed or len(sys.argv) > 1:
        print("\n".join(places))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
