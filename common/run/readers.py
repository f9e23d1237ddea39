"""Data that are given without their reader: what a path holds, and the flags that read it."""

import inspect
import json
import os
import pkgutil
import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import InputError, nearest, short_path
from common.run.layers import from_here
from common.sources.compressed import ending
from common.sources.csv_files import first_rows
from common.sources.files import part_files

ROWS = 50  # of a file, to tell a table from texts


class Kind(NamedTuple):
    """A kind of data.

    Attributes:
        name: in a message.
        sign: an argument that only its readers have.
        preset: the file in which a recipe for several kinds holds its settings for this one.
        recipe: a recipe that takes it.
    """

    name: str
    sign: str
    preset: str
    recipe: str


IMAGES = Kind("images", "image", "images.yaml", "classification")
IDX = Kind("images in IDX files", "class_names", "idx.yaml", "classification")
TABLE = Kind("a table", "categorical", "table.yaml", "regression")
LABELLED_TEXT = Kind("text in a table", "text", "text.yaml", "classification")
TEXT = Kind("text", "column", "corpus.yaml", "lm")


def kind_of(path: Path) -> Kind | None:
    """What a file or folder holds, by its names and its first rows; None if that is not clear."""
    if files := part_files(path):
        return kind_of(next(iter(files.values())))
    if path.is_dir():
        names = [name for _, _, files in islice(os.walk(path), 100) for name in files]
        if any(name.startswith("train-images-idx3-ubyte") for name in names):
            return IDX
        ends = {Path(name).suffix.lower() for name in names}
        images = ends & {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
        return IMAGES if images else TEXT if ends & {".txt", ".md", ".py", ".rst"} else None
    if path.suffix.lower() in (".txt", ".md", ".py", ".rst"):
        return TEXT
    try:
        rows = _rows(path)
    except (OSError, ValueError, KeyError, InputError):  # whoever reads the file reports it
        return None
    columns = {name: [row[name] for row in rows if row.get(name) is not None] for name in (rows[0] if rows else ())}
    if any(isinstance(value, bytes | dict) for values in columns.values() for value in values):
        return IMAGES
    words = [[len(value.split()) for value in values if isinstance(value, str)] for values in columns.values()]
    if any(counts and sum(counts) / len(counts) > 3 for counts in words):
        return LABELLED_TEXT if len(columns) > 1 else TEXT
    return TABLE if columns else None


def _rows(path: Path) -> list[dict[str, Any]]:
    """The first rows of a table."""
    end = ending(path)
    if end in (".csv", ".tsv"):
        return first_rows(path, ROWS).to_dict("records")
    if end == ".parquet":
        from pyarrow.parquet import ParquetFile

        return next(ParquetFile(path).iter_batches(ROWS)).to_pylist()
    if end in (".jsonl", ".ndjson") and end == path.suffix.lower():
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in islice(lines, ROWS)]
    return []


def reading(key: str, value: str, known: Mapping[str, Any], recipe: Path) -> str:
    """What to do about data that a recipe does not take by this key; nothing if the value names none.

    Args:
        key: as it is given, such as ``data.source.path``.
        value: a path.
        known: the command's arguments by key.
        recipe: the recipe's folder.
    """
    place = Path(value).expanduser()
    path_like = (
        "/" in value or bool(re.search(r"\.([ct]sv|ndjson|jsonl?|parquet|txt|md)(\.\w+)?$", value)) or place.exists()
    )
    if not path_like and not key.endswith("path"):
        return ""
    source = "data.predict_source" if key.startswith("data.predict_source") else "data.source"
    readers = _readers(known[source], recipe) if source in known else []
    flag = "data.path" if "data.path" in known else f"{source}.path"
    names = ", ".join(reader.__name__ for reader in readers)
    if not place.exists():
        folder = place.parent if place.parent.is_dir() else Path()
        fix = f"; for a hub name give --{source} too, one of {names}" if names else f"; give --{flag}"
        hint = nearest(place.name, os.listdir(folder)) or fix
        return f"{short_path(value)}: no such file or folder{hint}"
    kind = kind_of(place)
    if source not in known:
        if kind not in (TEXT, LABELLED_TEXT, None):
            return _elsewhere(value, kind, recipe)
        return f"give --{flag} {value}" if key != flag else ""
    if kind is None:
        return f"{short_path(value)} does not show what it holds; give --{source} one of {names}, and --{flag}"
    fitting = next((reader for reader in readers if kind.sign in inspect.signature(reader).parameters), None)
    if fitting is None:
        return (
            _elsewhere(value, kind, recipe)
            or f"{short_path(value)} holds {kind.name}, which no reader of {recipe.name} takes"
        )
    preset = recipe / kind.preset
    name = fitting.__name__ if fitting.__module__.startswith("recipes.") else f"common.sources.{fitting.__name__}"
    if not hasattr(pkgutil.resolve_name("common.sources"), fitting.__name__):
        name = fitting.__name__
    told = f"--config {from_here(preset)}" if preset.is_file() and source == "data.source" else f"--{source} {name}"
    more = [
        f"--{source}.{each.name} {'COLUMN' if each.name in ('target', 'label') else each.name.upper()}"
        for each in inspect.signature(fitting).parameters.values()
        if (each.default is each.empty and each.name != "path" and "--config" not in told)
        or (each.name in ("target", "label") and each.default is None and source == "data.source")
    ]
    return f"{short_path(value)} holds {kind.name}; give {' '.join([told, f'--{flag} {value}', *more])}"


def _readers(action: Any, recipe: Path) -> list[type]:
    """The classes that an argument takes and that read a path; not those of another recipe in this process."""
    kinds = map(pkgutil.resolve_name, re.findall(r"([\w.]+)(?:,|$)", action.extra_help()))
    own = [k for k in kinds if k.__module__[:8] != "recipes." or Path(inspect.getfile(k)).parent == recipe]
    return [kind for kind in own if "path" in inspect.signature(kind).parameters]


def _elsewhere(value: str, kind: Kind | None, recipe: Path) -> str:
    """Which other recipe takes a kind of data."""
    train = recipe.with_name(kind.recipe if kind else "") / "train.py"
    if kind is None or not train.is_file() or recipe.name == kind.recipe:
        return ""
    flag = "--data.path" if kind is TEXT else "--data.source.path"
    return (
        f"{short_path(value)} holds {kind.name}; another recipe takes it: python {from_here(train)} fit {flag} {value}"
    )
