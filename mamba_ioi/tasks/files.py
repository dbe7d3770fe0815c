"""Files of records, a row a pair: JSON Lines, CSV and Parquet."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .texts import TEXT_FIELDS, TOKEN_FIELDS, Record

OBJECTS = ("marks", "groups")
FIELDS = (*TEXT_FIELDS, *TOKEN_FIELDS, "candidates", *OBJECTS, "group", "bos", "length", "metric")
ANSWERS = ("answer", "corrupt_answer")


def read_records(path: str | Path) -> list[Record]:
    """The rows of a file, fields that a row leaves empty left out.

    Raises:
        ValueError: if the file's name ends otherwise, or it is not what its name says.
        OSError: if it cannot be read.
    """
    path = Path(path).expanduser()
    read = {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}[_format(path)]
    records = []
    for row, record in enumerate(read(path)):
        for name in record:
            near = difflib.get_close_matches(str(name), FIELDS, n=1, cutoff=0.8)
            if name not in FIELDS and near:
                raise ValueError(f"row {row}: the field {name!r} is unknown; did you mean {near[0]!r}?")
        records.append({name: value for name, value in record.items() if name in FIELDS and value is not None})
    return records


def write_records(path: str | Path, records: Sequence[Record]) -> Path:
    """Write rows to a file; its path.

    Raises:
        ValueError: if the file's name ends otherwise.
        OSError: if it cannot be written.
    """
    path = Path(path).expanduser()
    write = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}[_format(path)]
    for name in ANSWERS:
        if any(isinstance(record.get(name), list | tuple) for record in records):
            records = [
                record | {name: [record[name]]} if isinstance(record.get(name), str) else record for record in records
            ]
    write(path, records)
    return path


def group_columns(records: Sequence[Record]) -> dict[str, list]:
    """The labels of the rows: those in ``groups``, and ``group``.

    Raises:
        ValueError: if some rows have labels that others lack.
    """
    rows = []
    for row, record in enumerate(records):
        labels = record.get("groups", {})
        if not isinstance(labels, dict):
            raise ValueError(f"row {row} of groups: {labels!r:.80} is no object such as {{'name': 'label'}}")
        rows.append(labels | ({"group": record["group"]} if "group" in record else {}))
    names = list(dict.fromkeys(name for labels in rows for name in labels))
    for row, labels in enumerate(rows):
        for name in names:
            if name not in labels:
                raise ValueError(f"row {row} lacks the label {name!r} (field group or groups), which other rows have")
    return {name: [labels[name] for labels in rows] for name in names}


def group_fields(groups: Mapping[str, list], row: int) -> Record:
    """The fields that hold a row's labels."""
    labels = {name: column[row] for name, column in groups.items()}
    if list(labels) == ["group"] and all(isinstance(label, str) for label in groups["group"]):
        return labels
    return {"groups": labels} if labels else {}


def metric_of(records: Sequence[Record]) -> str:
    """The metric that the rows name, one for all.

    Raises:
        ValueError: if they name several.
    """
    names = [record.get("metric", "nld") for record in records]
    for row, name in enumerate(names):
        if name != names[0]:
            raise ValueError(f"row {row} of metric: {name!r}, but row 0 has {names[0]!r}; a file has one metric")
    return names[0] if names else "nld"


def _format(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".csv", ".parquet"):
        raise ValueError(f"{path}: the name of a file of pairs ends in .jsonl, .csv or .parquet")
    return suffix


def _read_jsonl(path: Path) -> Iterable[Record]:
    row = 0
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"row {row} (line {number})"
        record = _parse(line, place)
        if not isinstance(record, dict):
            raise ValueError(f"{place}: {line.strip()!r:.80} is no JSON object")
        yield record
        row += 1


def _write_jsonl(path: Path, records: Sequence[Record]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _read_csv(path: Path) -> Iterable[Record]:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    row = -1
    try:
        header = next(reader, [])
        for name in header:
            if name in FIELDS and header.count(name) > 1:
                raise ValueError(f"the header names the column {name!r} twice")
        for row, cells in enumerate(line for line in reader if line):
            if len(cells) != len(header):
                raise ValueError(
                    f"row {row} (line {reader.line_num}): it has {len(cells)} fields, the header {len(header)}"
                )
            yield {
                name: _cell(name, cell, f"row {row} of {name}")
                for name, cell in zip(header, cells, strict=True)
                if cell or name in TEXT_FIELDS
            }
    except csv.Error as error:
        raise ValueError(f"row {row + 1} (line {reader.line_num}): it is no CSV: {error}") from None


def _cell(name: str, cell: str, place: str) -> Any:
    """What a cell of a CSV file says; texts as they stand."""
    if name in ANSWERS:
        return _list_of_texts(cell)
    if name in (*TOKEN_FIELDS, *OBJECTS, "candidates", "bos", "length"):
        return _parse(cell.lower() if name == "bos" else cell, place)
    return cell


def _list_of_texts(cell: str) -> str | list[str]:
    """A list where the cell is a JSON list of texts, else the cell."""
    try:
        found = json.loads(cell) if cell.startswith("[") else None
    except ValueError:
        return cell
    return found if isinstance(found, list) and found and all(isinstance(text, str) for text in found) else cell


def _write_csv(path: Path, records: Sequence[Record]) -> None:
    names = _names(records)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for record in records:
            writer.writerow([_as_cell(name, record.get(name)) for name in names])


def _as_cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value if name not in ANSWERS or _list_of_texts(value) == value else json.dumps([value])
    return json.dumps(value, ensure_ascii=False)


def _read_parquet(path: Path) -> Iterable[Record]:
    import pyarrow
    import pyarrow.parquet

    with path.open("rb") as file:
        try:
            rows = pyarrow.parquet.read_table(file).to_pylist()
        except pyarrow.ArrowException as error:
            raise ValueError(f"it is no Parquet file: {str(error).splitlines()[0]}") from None
    for row, record in enumerate(rows):
        for name in (*OBJECTS, "candidates"):
            value = record.get(name)
            if isinstance(value, str):
                value = _parse(value, f"row {row} of {name}")
            if name in OBJECTS and isinstance(value, list):  # a column of Arrow's type map
                value = dict(value)
            if name == "groups" and isinstance(value, dict):  # a struct has all names in every row
                value = {key: entry for key, entry in value.items() if entry is not None}
            record[name] = value
        yield record


def _write_parquet(path: Path, records: Sequence[Record]) -> None:
    import pyarrow
    import pyarrow.parquet

    names = _names(records)
    rows = []
    for record in records:
        objects = {name: json.dumps(record[name], ensure_ascii=False) for name in OBJECTS if name in record}
        rows.append(dict.fromkeys(names) | record | objects)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _names(records: Sequence[Record]) -> list[str]:
    """The fields that occur, in one order."""
    found = {name for record in records for name in record}
    return [name for name in FIELDS if name in found]


def _text(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no text in UTF-8: {error}") from None


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place}: {text.strip()!r:.80} is no JSON: {error}") from None
