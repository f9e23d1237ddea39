"""Corpora as people keep them, generated: their documents are read as they were written, or one line says what is."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from common.errors import InputError
from common.sources.documents import find_files, read_file

WORDS = [
    "NA",
    "None",
    "null",
    "nan",
    "N/A",
    "",
    "007",
    "1,200",
    "true",
    "naïve",
    "日本",
    "🙂",
    "a\tb",
    'say "x"',
    "; | ,",
]
FORMATS = ["txt", "md", "csv", "tsv", "semicolon.csv", "jsonl", "ndjson", "json", "pretty.json", "parquet"]
ENDINGS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content, asbytes=True),
}


def written(form: str, texts: list[str], encoding: str) -> bytes:
    """A file's content; a text file holds one document."""
    rows = [{"n": number, "text": text} for number, text in enumerate(texts)]
    stream = io.StringIO(newline="")
    if form in ("txt", "md"):
        stream.write("\n".join(texts))
    elif form in ("csv", "tsv", "semicolon.csv"):
        mark = {"csv": ",", "tsv": "\t", "semicolon.csv": ";"}[form]
        writer = csv.DictWriter(stream, ["n", "text"], delimiter=mark)
        writer.writeheader()
        writer.writerows(rows)
    elif form == "parquet":
        sink = io.BytesIO()
        parquet.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue()
    elif form == "json":
        json.dump(rows, stream)
    elif form == "pretty.json":
        json.dump(rows, stream, indent=2, ensure_ascii=False)
    else:
        stream.write("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows))
    return stream.getvalue().encode(encoding)


def documents(file: Path, column: str = "text") -> list[str]:
    """What the reader makes of a file."""
    found: list[str] = []
    for begins, text in read_file(file, column):
        if begins:
            found.append(text)
        else:
            found[-1] += text
    return found


CASES = [
    (form, end, encoding)
    for form, end, encoding in product(FORMATS, ENDINGS, ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
    if form != "parquet" or encoding == "utf-8"
]


def test_generated_corpora_are_read_as_they_were_written(tmp_path: Path) -> None:
    draw = random.Random(0)
    for number, (form, end, encoding) in enumerate(CASES):
        texts = [*draw.sample(WORDS, 8), "line\nends\r\nhere", "long " * draw.choice([1, 40_000])]
        name = f"{number}.{form}{end}"
        file = tmp_path / (name.upper() if number % 2 else name)
        file.write_bytes(ENDINGS[end](written(form, texts, encoding)))
        one = ["\n".join(texts)]
        assert documents(file) == (one if form in ("txt", "md") else [text for text in texts if text]), file.name
    assert len(CASES) == 185
    found = find_files(tmp_path)
    assert len(found.files) == len(CASES)
    assert not found.left_out


TABLE = 'n,text\n1,"one, two"\n2,three\n'
LINES = '{"text": "one"}\n{"text": "two"}\n'
DAMAGED: dict[str, tuple[str, bytes, str]] = {
    "cut gz": ("a.txt.gz", gzip.compress(b"words " * 9999)[:-30], "is cut short, damaged or no .gz file"),
    "cut xz": ("a.csv.xz", lzma.compress(TABLE.encode())[:-9], "is cut short, damaged or no .xz file"),
    "cut bz2": ("a.jsonl.bz2", bz2.compress(LINES.encode())[:-9], "is cut short, damaged or no .bz2 file"),
    "cut zst": ("a.txt.zst", ENDINGS[".zst"](b"words " * 9999)[:-9], "is cut short, damaged or no .zst file"),
    "no gz": ("a.jsonl.gz", LINES.encode(), "is cut short, damaged or no .gz file"),
    "no parquet": ("a.parquet", TABLE.encode(), "cannot be read as parquet"),
    "cut parquet": ("a.parquet", written("parquet", WORDS, "utf-8")[:-9], "cannot be read as parquet"),
    "zip": ("a.zip", b"PK\3\4", "is an archive; unpack it"),
    "tar": ("a.tar.gz", gzip.compress(b"x"), "is an archive; unpack it"),
    "latin": ("a.csv", "text\né\n".encode("latin1"), "not UTF-8 at byte 5"),
    "latin in JSON": ("a.jsonl", '{"text": "é"}\n'.encode("latin1"), "not UTF-8 at byte 10"),
    "no mark": ("a.txt", "words".encode("utf-16-le"), "is no text, or not UTF-8"),
    "binary": ("a.txt", bytes(range(256)), "is no text, or not UTF-8"),
    "odd UTF-16": ("a.txt", "words".encode("utf-16")[:-1], "not UTF-16"),
    "broken line": ("a.jsonl", (LINES + '{"text": oops}\n').encode(), "line 3 is no JSON"),
    "cut line": ("a.ndjson", LINES[:-4].encode(), "line 2 is no JSON"),
    "cut list": ("a.json", b'[{"text": "a"},', "is no JSON"),
    "deep": ("a.jsonl", b"[" * 100_000 + b"\n", "line 1 is no JSON"),
    "number": ("a.jsonl", (LINES + '{"text": 17}\n').encode(), "line 3: 'text' holds 17, which is no text"),
    "list": ("a.json", b'[{"text": ["a"]}]', "row 1: 'text' holds ['a'], which is no text"),
    "NaN": ("a.jsonl", b'{"text": NaN}', "line 1: 'text' holds nan, which is no text"),
    "no object": ("a.jsonl", b'"text"\n', "line 1 is no object"),
    "half a character": ("a.jsonl", rb'{"text": "\ud800"}', "line 1: 'text' holds half of a character"),
    "column": ("a.jsonl", b'{"txt": "a"}\n{"n": 1}\n', "no column 'text'; did you mean 'txt'?"),
    "column of a table": ("a.csv", b"n,txt\n1,a\n", "no column 'text'; did you mean 'txt'?"),
    "twice": ("a.csv", b"text,text\na,b\n", "has two columns named 'text'"),
    "more cells": ("a.csv", b"text,n\na,1\nb,c,2\n", "line 3 has 3 cells, and the first line 2"),
    "fewer cells": ("a.tsv", b"n\ttext\n1\ta\n2\n", "line 3 has 1 cells, and the first line 2"),
    "open quote": ("a.csv", b'n,text\n1,"a\n2,b\n', "line 3: unexpected end of data; mend its quotes"),
    "stray quote": ("a.csv", b'n,text\n1,"a"b\n', "line 2: "),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_no_text_is_named(tmp_path: Path, kind: str) -> None:
    name, content, problem = DAMAGED[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=r"\A[^\n]{,240}\Z") as caught:
        documents(tmp_path / name)
    assert f"{name}: {problem}" in str(caught.value)


def test_only_the_asked_column_counts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "n": 1}\n\n{"n": "b"}\n{"text": null, "n": [2]}\n{"text": "c"}\n')
    assert documents(tmp_path / "a.jsonl") == ["a", "c"]
    (tmp_path / "a.csv").write_text("text,n,n\na,1,x\n,2,y\n")
    assert documents(tmp_path / "a.csv") == ["a"]


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    (tmp_path / "own" / "deep").mkdir(parents=True)
    (tmp_path / "other" / "__MACOSX").mkdir(parents=True)
    for place in ("own/a.txt", "own/deep/b.TXT", "other/c.md", "other/d.pdf", "other/.e.txt", "other/__MACOSX/f.txt"):
        (tmp_path / place).write_text(place)
    (tmp_path / "own" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "own" / "deep" / "up").symlink_to(tmp_path / "own")
    (tmp_path / "own" / "gone.txt").symlink_to(tmp_path / "nothing")
    files, left_out = find_files(tmp_path / "own")
    assert [file.name for file in files] == ["a.txt", "b.TXT", "c.md"]
    assert [file.name for file in left_out] == ["gone.txt", "d.pdf"]
