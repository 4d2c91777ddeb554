"""The metrics file of a run: one row per step, with all numbers that were logged at the step, under flat names.

```
{"step": 10, "time": 1764149893.4, "train/loss": 0.52, "train/lr/0": 0.001}
{"step": 20, "time": 1764149894.1, "train/loss": 0.47, "train/lr/0": 0.001, "val/loss": 0.49}
```

Or the same as a CSV file, with one column per name. If a new name appears later, the file is written again with one
more column, and renamed. NaN is null in JSON, and infinity is 1e999, which every reader parses as infinity.
"""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .step_lines import StepLines

METRICS = "metrics"
"""Name of the file in the workspace, without its extension."""
FORMATS = ("jsonl", "csv")
_OWN = ("step", "time")

Row = dict[str, int | float]


class MetricsFile:
    """Writes the metrics file of a workspace. Each method may raise an `OSError`.

    Args:
        workspace: The folder.
        format: "jsonl" or "csv".
    """

    def __init__(self, workspace: Path, format: str) -> None:
        self.path = workspace / f"{METRICS}.{format}"
        self._is_csv = format == "csv"
        self._lines = StepLines(self.path, _step_in_csv if self._is_csv else step_in_json)
        self._columns: list[str] = []
        self._last: Row = {}

    def set_aside(self) -> None:
        """Give the file of another run, if there is one, the name `metrics.old.jsonl` or `metrics.old.csv`."""
        set_aside(self.path)

    def open(self, step: int) -> int:
        """Cut off the rows of steps after `step`, and an incomplete row.

        Returns:
            The number of rows of later steps.
        """
        num_cut = self._lines.cut(step)
        self._columns, self._last = [], {}
        if self._is_csv and self._lines.last:
            with self.path.open(newline="", encoding="utf-8") as file:
                self._columns = next(csv.reader(file))
        if self._lines.last:
            self._last = dict(next(iter(self._parsed(self._lines.last)), {}))
        return num_cut

    def _parsed(self, line: bytes) -> list[Row]:
        text = line.decode(errors="replace")
        if not self._is_csv:
            return _json_rows([text])
        return _csv_rows([_csv_line(self._columns), text])

    def put(self, step: int, numbers: Mapping[str, int | float]) -> None:
        """Write the numbers of a step. If the last row has the same step, they are added to it."""
        named = {(f"logged/{name}" if name in _OWN else name): value for name, value in numbers.items()}
        if self._is_csv:
            named = {" ".join(name.splitlines()): value for name, value in named.items()}
        joins = self._last.get("step") == step
        row: Row = {**self._last, **named} if joins else {"step": step, "time": round(time.time(), 3), **named}
        if self._is_csv:
            self._put_csv(row, joins)
        else:
            line = f"{{{', '.join(f'{json.dumps(name)}: {_in_json(value)}' for name, value in row.items())}}}\n"
            (self._lines.replace_last if joins else self._lines.append)(line.encode())
        self._last = row

    def _put_csv(self, row: Row, joins: bool) -> None:
        if not self.path.exists():  # somebody has removed the file
            self._columns, joins = [], False
        columns = self._columns + [name for name in row if name not in self._columns]
        line = _csv_line([_in_csv(row[name]) if name in row else "" for name in columns])
        if columns == self._columns:
            (self._lines.replace_last if joins else self._lines.append)(line.encode())
            return
        old = self.path.read_bytes().split(b"\n")[1:-1] if self._columns else []
        if joins and old:
            old.pop()
        more = b"," * (len(columns) - len(self._columns))
        rows = [line + more + b"\n" for line in old]
        self._lines.rewrite(b"".join([_csv_line(columns).encode(), *rows, line.encode()]))
        self._columns = columns

    def sync(self) -> None:
        """Make the rows durable."""
        self._lines.sync()


class ObjectsFile:
    """Writes `histograms.jsonl` or `texts.jsonl` of a workspace: one line per logged object. Each method may raise an
    `OSError`.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines = StepLines(path, step_in_json)

    def open(self, step: int) -> None:
        """Cut off the lines of steps after `step`, and an incomplete line."""
        self._lines.cut(step)

    def put(self, step: int, name: str, fields: Mapping[str, Any]) -> None:
        """Write the object with this name that was logged at a step."""
        row = {"step": step, "time": round(time.time(), 3), "name": name, **fields}
        self._lines.append(f"{json.dumps(row, ensure_ascii=False)}\n".encode(errors="backslashreplace"))

    def sync(self) -> None:
        """Make the lines durable."""
        self._lines.sync()

    def set_aside(self) -> None:
        """Rename the file of another run, as `MetricsFile.set_aside` does."""
        set_aside(self.path)


def read_metrics(workspace: Path | str) -> list[Row]:
    """The rows of the metrics file in a workspace, in the order of the steps. The run may still be going.

    Args:
        workspace: The trainer's workspace, or the path of a metrics file.

    Returns:
        The numbers that were logged at each step, under flat names such as "train/loss", with "step" and "time". Empty
        if there is no file.
    """
    path = Path(workspace)
    files = [path] if path.suffix[1:] in FORMATS and path.is_file() else [path / f"{METRICS}.{end}" for end in FORMATS]
    for file in files:
        try:
            whole, _, _ = file.read_bytes().rpartition(b"\n")
        except (FileNotFoundError, NotADirectoryError):
            continue
        lines = whole.decode(errors="replace").split("\n")
        return _csv_rows(lines) if file.suffix == ".csv" else _json_rows(lines)
    return []


def set_aside(path: Path) -> None:
    """Put "old" before the extension of a file, if it exists."""
    if path.exists():
        path.replace(path.with_suffix(f".old{path.suffix}"))


def step_in_json(line: bytes) -> int | None:
    """The step in a line of JSON. None: the line is damaged."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _step_in_csv(line: bytes) -> int | None:
    first = line.partition(b",")[0]
    return int(first) if first.isdigit() else None


def _in_json(value: int | float) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "null" if math.isnan(value) else "1e999" if value > 0 else "-1e999"
    return json.dumps(+value)  # a bool as a number


def _in_csv(value: int | float) -> str:
    return repr(+value)


def _csv_line(values: Sequence[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def _json_rows(lines: Sequence[str]) -> list[Row]:
    rows = []
    for line in lines:
        try:
            row: Any = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


def _csv_rows(lines: Sequence[str]) -> list[Row]:
    rows: list[Row] = []
    for cells in csv.DictReader(lines):
        try:
            row: Row = {name: _number(cell) for name, cell in cells.items() if cell}
        except (TypeError, ValueError):
            continue
        if isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _number(cell: str) -> int | float:
    try:
        return int(cell)
    except ValueError:
        return float(cell)
