"""Documents of text in files, as their owner sees them: a text file is one, each row of a table is one.

Python's csv and json and pyarrow read them. A row that is no text is named by its line; words such as NA are words.
"""

import csv
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

from common.errors import InputError, nearest, short_path
from common.sources.compressed import DAMAGED, ending, is_compressed, opened

TEXTS = (".txt", ".text", ".md", ".rst", ".py")
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
DELIMITERS = ",;\t|"
LOOKED_AT = 1 << 12  # bytes that show whether a file is a text
PIECE = 1 << 16  # characters of a document to encode at a time
# Where a document can be cut without changing a token: byte-level and Metaspace tokenizers never join a space to the
# character before it; byte-level ones never join white space to a letter before it, nor a line end to a word after it.
CUT = re.compile(r"(?s:.*\S(?= )|.*(?:[^\W_](?=\s)|\S\n(?=\w)))")
Piece = tuple[bool, str]  # whether a document begins here, and some of its text
MARKS = {b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}


class Found(NamedTuple):
    """Files of text in a folder, and the others."""

    files: list[Path]
    left_out: list[Path]


def find_files(folder: str | Path, skip: Sequence[str] = ()) -> Found:
    """The files of a folder and all below it, in order; links are followed, each folder is read once.

    Hidden files, and what systems leave beside data, are no data.

    Args:
        folder: the folder.
        skip: names of folders to leave out.
    """
    files, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = [name for name in sorted(folders) if name[0] != "." and name not in (*skip, "__MACOSX")]
        files += [Path(parent, name) for name in names if name[0] != "." and name not in ("Thumbs.db", "desktop.ini")]
    files.sort()
    known = [file for file in files if file.is_file() and ending(file) in TEXTS + TABLES]
    return Found(known, sorted({*files} - {*known}))


def read_file(file: Path, column: str) -> Iterator[Piece]:
    """The documents of a file in pieces. A file whose ending says nothing else is a text; an empty cell is none.

    Args:
        file: the file, which may be compressed.
        column: the text's column in tables.

    Raises:
        InputError: the file is damaged, or is not UTF-8 or marked as UTF-16; it has no such column; or a row of it is
            no text.
    """
    name, kind = short_path(file), ending(file)
    if kind in ARCHIVES or file.suffix.lower() in ARCHIVES:
        raise InputError(f"{name}: is an archive; unpack it, and name the folder")
    try:
        if not file.stat().st_size:
            return
        if kind == ".parquet":
            yield from _documents(_parquet(file, column, name))
            return
        with opened(file) as raw:
            head = raw.read(LOOKED_AT)
        encoding = next((MARKS[head[:length]] for length in (4, 2) if head[:length] in MARKS), "utf-8-sig")
        if encoding == "utf-8-sig" and b"\0" in head:
            raise InputError(f"{name}: is no text, or not UTF-8; convert it (iconv -t utf-8) or leave it out")
        with opened(file) as raw, io.TextIOWrapper(raw, encoding, newline="") as stream:
            try:
                if kind in (".csv", ".tsv"):
                    yield from _documents(_csv(stream, kind, column, name))
                elif kind in TABLES:
                    yield from _documents(_json(stream, kind, column, name))
                else:
                    yield from pieces(stream)
            except UnicodeDecodeError as error:
                place = "" if is_compressed(file) else f" at byte {raw.tell() - len(error.object) + error.start}"
                written = "UTF-8" if encoding == "utf-8-sig" else encoding.upper()
                fix = "convert it (iconv -t utf-8) or leave it out"
                raise InputError(f"{name}: not {written}{place}; {fix}") from error
    except DAMAGED as error:
        if reason := getattr(error, "strerror", None):  # no permission
            raise InputError(f"{name}: cannot be read ({reason}); mend that or leave it out") from error
        problem = f"is cut short, damaged or no {file.suffix} file"
        raise InputError(f"{name}: {problem}; fetch it again or leave it out") from error


def pieces(document: io.TextIOBase) -> Iterator[Piece]:
    """A document in pieces of about ``PIECE`` characters, cut where no token is; an empty one has none."""
    rest, begins = "", True
    while chunk := document.read(PIECE):
        rest += chunk
        if len(rest) >= PIECE:
            cut = CUT.match(rest)
            end = cut.end() if cut else len(rest)
            yield begins, rest[:end]
            rest, begins = rest[end:], False
    if rest:
        yield begins, rest


def _documents(texts: Iterable[str]) -> Iterator[Piece]:
    return chain.from_iterable(pieces(io.StringIO(text)) for text in texts)


def _parquet(file: Path, column: str, name: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with opened(file) as raw:
            table = parquet.ParquetFile(io.BytesIO(raw.read()) if is_compressed(file) else file)
        _has(column, table.schema_arrow.names, name)
        row = 0
        for batch in table.iter_batches(100, columns=[column]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield _text(value, column, f"{name}: row {row}")
    except pyarrow.ArrowException as error:
        reason = shorten(str(error), 60)
        raise InputError(f"{name}: cannot be read as parquet ({reason}); mend it or leave it out") from error


def _csv(stream: Iterable[str], kind: str, column: str, name: str) -> Iterator[str]:
    limit = csv.field_size_limit(sys.maxsize)  # a document may be long
    try:
        lines = iter(stream)
        first = next(lines, "")
        heads = {
            mark: next(csv.reader([first], delimiter=mark), []) for mark in ("\t" if kind == ".tsv" else DELIMITERS)
        }
        mark = next((mark for mark, head in heads.items() if column in head), None)
        if mark is None:
            _has(column, max(heads.values(), key=len), name)
        names = heads[str(mark)]
        if names.count(column) > 1:
            raise InputError(f"{name}: has two columns named {column!r}; rename one")
        place, rows = names.index(column), csv.reader(lines, delimiter=str(mark), strict=True)
        for row in rows:
            if row and len(row) != len(names):
                problem = f"has {len(row)} cells, and the first line {len(names)}"
                raise InputError(f"{name}: line {rows.line_num + 1} {problem}; quote its text or mend it")
            if row:
                yield row[place]
    except csv.Error as error:
        raise InputError(f"{name}: line {rows.line_num + 1}: {error}; mend its quotes") from error
    finally:
        csv.field_size_limit(limit)


def _json(stream: Any, kind: str, column: str, name: str) -> Iterator[str]:
    """Of a line or a list; a row without the column is empty, as writers leave out what is null."""
    names: dict[str, None] = {}
    for place, row in _rows(stream, kind, name):
        if not isinstance(row, Mapping):
            raise InputError(f"{name}: {place} is no object; write {{{json.dumps(column)}: …}}")
        names |= dict.fromkeys(row)
        yield _text(row.get(column), column, f"{name}: {place}")
    if names:
        _has(column, list(names), name)


def _rows(stream: Any, kind: str, name: str) -> Iterator[tuple[str, Any]]:
    first = stream.readline()
    try:
        whole = kind == ".json" and not isinstance(json.loads(first), Mapping)
    except ValueError:
        whole = kind == ".json"
    if whole:
        try:
            found = json.loads(first + stream.read())
        except (ValueError, RecursionError) as error:
            raise InputError(f"{name}: is no JSON ({shorten(str(error), 60)}); mend it") from error
        rows = found if isinstance(found, list) else [found]
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        return
    for number, line in enumerate(chain([first], stream), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{name}: line {number} is no JSON ({shorten(str(error), 60)}); mend it") from error
            yield f"line {number}", row


def _text(value: Any, column: str, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{place}: {column!r} holds {shorten(repr(value), 40)}, which is no text; mend or remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: {column!r} holds half of a character; mend or remove it") from error
    return value


def _has(column: str, names: Sequence[str], name: str) -> None:
    if column not in names:
        fix = nearest(column, names) or f"; there are: {shorten(', '.join(names), 60)}"
        raise InputError(f"{name}: no column {column!r}{fix}")
