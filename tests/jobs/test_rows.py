"""Rows of every format are read from any row on; what is broken is a row with an error."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastdiff.jobs.rows import MAX_LINE, Reader, open_rows

VALUES = [{"prompt": f'a "cat", {n}\nand more é', "seed": n, "steps": None} for n in range(700)]


def jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in VALUES))


def comma(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, VALUES[0].keys())
        writer.writeheader()
        writer.writerows(VALUES)


def parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(VALUES), path, row_group_size=300)


def tar(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for number, row in enumerate(VALUES):
            for ending, data in (
                ("txt", row["prompt"].encode()),
                ("json", json.dumps({"seed": row["seed"]}).encode()),
            ):
                member = tarfile.TarInfo(f"a/{number:04d}.{ending}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def expected(suffix: str) -> list[dict[str, Any]]:
    """The rows as Python's own readers see them."""
    if suffix == ".csv":
        return [{k: "" if v is None else str(v) for k, v in row.items()} for row in VALUES]
    if suffix == ".tar":
        return [{"txt": row["prompt"], "seed": row["seed"]} for row in VALUES]
    return VALUES


@pytest.mark.parametrize(
    ("suffix", "write"), [(".jsonl", jsonl), (".csv", comma), (".parquet", parquet), (".tar", tar)]
)
def test_rows_of_a_file(tmp_path: Path, suffix: str, write: Callable[[Path], None]) -> None:
    path = tmp_path / f"rows{suffix}"
    write(path)
    rows = open_rows(str(path))
    assert rows.count == len(VALUES)
    assert rows.files[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    wanted = expected(suffix)
    for start in (0, 1, 299, 300, 555, 699, 700):
        read = [*rows.read(start)]
        assert [row.number for row in read] == [*range(start, 700)]
        assert [row.values for row in read] == wanted[start:]
        assert all(row.error is None for row in read)


def test_text_has_a_line_per_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n\n  a dog\n\xff\nlast")
    rows = open_rows(str(tmp_path / "a.txt"))
    assert [(row.values, row.error) for row in rows.read()] == [
        ({"line": "a cat"}, None),
        ({"line": "a dog"}, None),
        ({"line": "\ufffd"}, "the line is not UTF-8 (byte 0)"),
        ({"line": "last"}, None),
    ]


def test_several_files_are_one_sequence(tmp_path: Path) -> None:
    for name, count in (("b", 3), ("a", 2), ("c", 4)):
        lines = (json.dumps({"seed": number, "name": name}) for number in range(count))
        (tmp_path / f"rows-{name}.jsonl").write_text("\n".join(lines))
    rows = open_rows(str(tmp_path / "rows-*.jsonl"))
    assert [row.values["name"] for row in rows.read()] == [*"aabbbcccc"]
    assert [(row.number, row.values["seed"]) for row in rows.read(4)] == [
        (4, 2), (5, 0), (6, 1), (7, 2), (8, 3),
    ]  # fmt: skip


def test_a_reader_goes_forwards_and_back(tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl")
    reader = Reader(open_rows(str(tmp_path / "rows.jsonl")))
    for start, stop in ((0, 3), (3, 5), (100, 102), (50, 51), (51, 52), (699, 800)):
        found = [(row.number, row.values["seed"]) for row in reader.read(start, stop)]
        assert found == [(n, n) for n in range(start, min(stop, 700))]


LINES = {
    b"": None,
    b'{"seed": 1}': None,
    b'{"seed": 1': "not valid JSON: Expecting ',' delimiter at column 11",
    b"[1, 2]": "expected an object with the columns of the row, got b'[1, 2]\\n'",
    b'{"seed": NaN}': "NaN is not valid JSON",
    b'{"a": "\xff"}': "the line is not UTF-8 (byte 7)",
    b'{"a": "' + b"x" * MAX_LINE + b'"}': f"the line is longer than {MAX_LINE:,} bytes",
    b'{"seed": 2}': None,
}


def test_a_broken_line_is_a_row_with_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(LINES) + b"\n" + b"[" * 100_000 + b"\n")
    rows = [*open_rows(str(tmp_path / "rows.jsonl")).read()]
    assert [row.error for row in rows[:-1]] == [error for line, error in LINES.items() if line]
    assert rows[-1].error  # nested too deeply for Python's reader
    assert rows[-2].values == {"seed": 2}


def test_a_broken_row_of_csv_is_a_row_with_an_error(tmp_path: Path) -> None:
    text = b"prompt,seed\na,1\nb\nc,2,3\n\xff,4\n\n" + b"x" * 200_000 + b",5\nd,6\n"
    (tmp_path / "rows.csv").write_bytes(text)
    rows = open_rows(str(tmp_path / "rows.csv"))
    found = [*rows.read()]
    assert rows.count == len(found) == 6
    assert [row.error for row in found] == [
        None,
        "expected 2 values, as in the header, got 1",
        "expected 2 values, as in the header, got 3",
        "the row is not UTF-8",
        "not valid CSV: field larger than field limit (131072)",
        None,
    ]
    assert found[-1].values == {"prompt": "d", "seed": "6"}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.xlsx", b"x", "unknown format of rows '.xlsx'"),
        ("a.jsonl", b"\n\n", "has no rows"),
        ("a.csv", b"prompt,prompt\na,b\n", "must name each column once"),
        ("a.csv", b"prompt,\na,b\n", "must name each column once"),
        ("a.csv", b"", "must name each column once"),
        ("a.parquet", b"PAR1", "is not a Parquet file"),
        ("a.tar", b"x" * 1024, "is not a whole tar"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        open_rows(str(tmp_path / name))


def test_a_tar_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    tar(tmp_path / "rows.tar")
    whole = (tmp_path / "rows.tar").read_bytes()
    (tmp_path / "rows.tar").write_bytes(whole[: len(whole) // 2 + 700])
    with pytest.raises(ValueError, match="is not a whole tar: unexpected end of data"):
        open_rows(str(tmp_path / "rows.tar"))


def test_a_quote_that_is_not_closed_is_a_row_with_an_error(tmp_path: Path) -> None:
    """The rows after it are part of the quoted cell for every reader of CSV."""
    (tmp_path / "rows.csv").write_text('prompt\na\n"a cat\na dog\n')
    found = [*open_rows(str(tmp_path / "rows.csv")).read()]
    assert [row.error for row in found] == [None, "not valid CSV: unexpected end of data"]


def test_what_follows_the_end_of_a_tar_is_not_dropped(tmp_path: Path) -> None:
    tar(tmp_path / "rows.tar")
    whole = (tmp_path / "rows.tar").read_bytes()
    for data, message in (
        (2 * whole, "goes on after its end; join tars with tar --concatenate"),
        (whole.rstrip(b"\0"), "is not a whole tar"),
        (whole[:1024] + b"x" * 512 + whole[1536:], "is not a whole tar"),
    ):
        (tmp_path / "rows.tar").write_bytes(data)
        with pytest.raises(ValueError, match=message):
            open_rows(str(tmp_path / "rows.tar"))


def test_missing_and_mixed_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file of rows at .*none\.csv"):
        open_rows(str(tmp_path / "none.csv"))
    (tmp_path / "a.csv").write_text("seed\n1\n")
    (tmp_path / "a.txt").write_text("a cat\n")
    with pytest.raises(ValueError, match=r"all files must have one format, got .csv, .txt"):
        open_rows(str(tmp_path / "a.*"))
    (tmp_path / "b.csv").write_text("steps\n1\n")
    with pytest.raises(ValueError, match="all files must have the same columns"):
        _ = open_rows(str(tmp_path / "*.csv")).columns
