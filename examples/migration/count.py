"""Counts the lines of each pair, without blank lines, comments and docstrings: `python examples/migration/count.py`."""

from __future__ import annotations

import ast
import difflib
import io
import tokenize
from pathlib import Path

HERE = Path(__file__).parent


def code_lines(path: Path) -> list[str]:
    """The lines that do something, without what is around them."""
    text = path.read_text()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, documented)]
    docstrings = [node.body[0] for node in nodes if ast.get_docstring(node) is not None]
    dropped = {n for d in docstrings for n in range(d.lineno, (d.end_lineno or d.lineno) + 1)}
    used: set[int] = set()
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            used.update(range(token.start[0], token.end[0] + 1))
    lines = text.splitlines()
    return [lines[n - 1].strip() for n in sorted(used - dropped)]


def table(root: Path = HERE) -> str:
    """Markdown: lines before and after, and those that a diff takes away and adds."""
    rows = ["| script | before | after | taken away | added |", "| --- | --- | --- | --- | --- |"]
    for folder in sorted(path.parent for path in root.glob("*/before.py")):
        before, after = code_lines(folder / "before.py"), code_lines(folder / "after.py")
        changes = [line[0] for line in difflib.ndiff(before, after)]
        counts = (len(before), len(after), changes.count("-"), changes.count("+"))
        rows.append(f"| {folder.name} | {' | '.join(map(str, counts))} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
