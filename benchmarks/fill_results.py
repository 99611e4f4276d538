"""Fill the rows of RESULTS.md that say "not measured" with what a GPU has measured.

    make gpu                                                   # appends its rows to benchmarks/gpu.jsonl
    python benchmarks/fill_results.py benchmarks/gpu.jsonl     # writes benchmarks/RESULTS.md

A table to be filled stands between two comments in RESULTS.md, and its first column names the rows:

    <!-- gpu: decode -->
    | row | ms | ratio | bar |
    |---|---|---|---|
    | Qwen2.5-7B, 64 rows | not measured | | 1.4x |
    <!-- end -->

The last line of JSON of that table and row fills the cells whose columns are named as its numbers are; others, such
as a bar, stay. Rows that the table does not have yet come below. The last line says on what all was measured.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

import cli
from cli import UserError

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"
BEGIN, END = "<!-- gpu: ", "<!-- end -->"
MACHINE = ("card", "date", "torch", "triton", "driver")


@dataclass
class Config:
    file: tyro.conf.Positional[str]
    """Lines of JSON, as `make gpu` writes them."""
    results: str = str(RESULTS)
    """What to fill."""


def fill(text: str, measured: list[dict]) -> str:
    """RESULTS.md with every marked table filled from the lines that name it. UserError: one that names no table."""
    lines = text.split("\n")
    filled = []
    known = set()
    while lines:
        line = lines.pop(0)
        filled.append(line)
        if line.startswith(BEGIN):
            name = line.removeprefix(BEGIN).removesuffix(" -->")
            known.add(name)
            end = lines.index(END)
            filled += fill_table(lines[:end], [row for row in measured if row["table"] == name])
            del lines[:end]
    for row in measured:
        if row["table"] not in known:
            raise UserError(f"RESULTS.md has no table {row['table']!r} for {row['row']!r}")
    return "\n".join(filled)


def fill_table(lines: list[str], measured: list[dict]) -> list[str]:
    """The lines of one table, filled; as they were where nothing was measured."""
    if not measured:
        return lines
    newest = {row["row"]: row for row in measured}
    header, rule, *body = [line for line in lines if line.startswith("|")]
    columns = cells(header)
    for row in measured:
        unknown = row.keys() - {*columns, "table", *MACHINE}
        if unknown:
            raise UserError(f"RESULTS.md, table {row['table']!r} has no column {min(unknown)!r}")
    filled = [header, rule]
    for old in map(cells, body):
        row = newest.pop(old[0], None)
        filled.append(joined(old if row is None else filled_cells(columns, old, row)))
    for name, row in newest.items():
        filled.append(joined(filled_cells(columns, [name, *[""] * (len(columns) - 1)], row)))
    machines = {row["row"]: described(row) for row in measured}
    return [*filled, "", "; ".join(dict.fromkeys(machines.values())) + "."]


def filled_cells(columns: list[str], old: list[str], row: dict) -> list[str]:
    """The cells of one row; of a column that was not measured, what it said, unless that is "not measured"."""
    new = []
    for column, cell in zip(columns, old, strict=True):
        if column in row and column != columns[0]:
            cell = written(row[column])
        new.append("" if cell == "not measured" else cell)
    return new


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def joined(row: list[str]) -> str:
    return "| " + " | ".join(row) + " |"


def written(value: float | str) -> str:
    """A number with three digits, or all of them before the point; text as it is."""
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def described(row: dict) -> str:
    """The machine that a row was measured on."""
    card, date, *versions = (row[name] for name in MACHINE)
    named = [f"{name} {version}" for name, version in zip(MACHINE[2:], versions)]
    return ", ".join([card, date, *named])


def main(config: Config) -> None:
    measured = cli.read_rows(config.file)
    for where, row in measured.items():
        missing = [name for name in ("table", "row", *MACHINE) if name not in row]
        if missing:
            raise UserError(f"{where}: no {missing[0]!r}, as a line of `make gpu` has it")
    text = fill(cli.read_text(config.results), list(measured.values()))
    cli.write_text(config.results, text)
    print(f"filled {config.results} from {len(measured)} rows")


if __name__ == "__main__":
    cli.run(main, Config)
