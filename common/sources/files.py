"""Sources of labelled images and texts: YAML names one (``data.source``), the data module reads it once."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from common.errors import InputError, nearest, short_path
from common.sources.compressed import ending
from common.sources.csv_files import are_codes, csv_files, padded, read_csv
from common.sources.images import CHANNELS, Images, list_images

# What has a class: a sample has one, or any number; each of its words has one; each position has its next token.
Labels = Literal["one", "several", "words", "next token"]


@dataclass(frozen=True)
class Labelled:
    """Samples as keyword arguments of a net, their classes, and the source's own splits.

    Attributes:
        inputs: argument name to values: a tensor of shape (samples, …), or what has such a ``shape`` and gives a tensor
            for positions, as :class:`common.sources.images.Images` do.
        target: class numbers, of each sample or of each of its positions; -1 for samples without labels, -100 for
            positions that do not count. Of several labels: 1 for each class that a sample has, 0 for all others.
        class_names: a name for each class number.
        num_test: size of the source's own test split, the last samples; 0 if it has none.
        num_val: size of its own validation split, the samples before these; 0 if it has none.
        tokenizer: of texts: the ``json`` of what has encoded them, of the package ``tokenizers``, and arguments of
            ``transformers.PreTrainedTokenizerFast``; plain values.
        groups: a number for the group of each sample, which stays together in a split; None if equal samples alone do.
        labels: what has a class.
    """

    inputs: Mapping[str, Any]
    target: Int64[Tensor, "samples *positions"]
    class_names: list[str]
    num_test: int = 0
    num_val: int = 0
    tokenizer: Mapping[str, Any] = field(default_factory=dict)
    groups: Int64[Tensor, " samples"] | None = None
    labels: Labels = "one"


class Source:
    """A source of labelled samples.

    Attributes:
        split: name of the column that says the part of each sample; None if there is none.
        group: name of the column whose equal values stay together in a split; None if there is none.
    """

    split: str | None = None
    group: str | None = None

    def read(self) -> Labelled:
        """Read everything.

        Raises:
            InputError: a file, column or label is missing or malformed.
        """
        raise NotImplementedError

    def take_over(self, facts: Mapping[str, Any]) -> None:
        """Take what is not set from the facts of a checkpoint, see :class:`common.sources.labelled.Samples`."""

    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """Columns by name, in the order of the samples.

        Raises:
            InputError: there is no such column.
        """
        raise InputError(f"data.keep: {type(self).__name__} has no columns; remove it")


class Digits(Source):
    """The 1,797 handwritten digits of 8x8 pixels that come with scikit-learn, scaled to [0, 1]."""

    def read(self) -> Labelled:  # noqa: D102
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        images = torch.from_numpy(digits.images).float()[:, None] / 16
        return Labelled({"pixel_values": images}, torch.from_numpy(digits.target).long(), [str(n) for n in range(10)])


class IDX(Source):
    """Images and labels in the IDX files of MNIST and its successors, gzipped or not, scaled to [0, 1].

    Args:
        path: folder with ``train-images-idx3-ubyte[.gz]``, ``train-labels…``, ``t10k-images…`` and ``t10k-labels…``.
        class_names: a name for each label.
    """

    def __init__(self, path: str, class_names: list[str]):
        self.path, self.class_names = Path(path).expanduser(), class_names

    def read(self) -> Labelled:  # noqa: D102
        images = [self._file(f"{part}-images-idx3-ubyte", 3) for part in ("train", "t10k")]
        labels = [self._file(f"{part}-labels-idx1-ubyte", 1) for part in ("train", "t10k")]
        target = torch.from_numpy(np.concatenate(labels)).long()
        if target.max() >= len(self.class_names):
            raise InputError(f"data.source.class_names: label {target.max()} of {self.path} has no name; add one")
        for some, their in zip(images, labels, strict=True):
            if len(some) != len(their) or some.shape[1:] != images[0].shape[1:]:
                found = f"{len(some)} images of {some.shape[1]}x{some.shape[2]} but {len(their)} labels"
                raise InputError(f"data.source.path: {found}; the files in {self.path} do not belong together")
        pixels = torch.from_numpy(np.concatenate(images)).float().unsqueeze(1).div_(255)
        return Labelled({"pixel_values": pixels}, target, self.class_names, num_test=len(labels[1]))

    def _file(self, name: str, axes: int) -> np.ndarray:
        path = next((p for p in (self.path / name, self.path / f"{name}.gz") if p.is_file()), None)
        if path is None:
            raise InputError(f"data.source.path: no file {name}[.gz] in {self.path}")
        try:
            content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        except (EOFError, OSError, zlib.error) as error:
            raise InputError(f"data.source.path: {path.name} is cut short or damaged; fetch it again") from error
        shape = np.frombuffer(content, ">u4", axes, offset=4) if len(content) >= 4 + 4 * axes else None
        if shape is None or content[:4] != bytes([0, 0, 8, axes]) or len(content) != 4 + 4 * axes + int(np.prod(shape)):
            raise InputError(
                f"data.source.path: {path.name} is no IDX file of {axes} axes, or cut short; fetch it again"
            )
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape.tolist())


class ImageTable(Source):
    """Labelled images in Parquet files, an image folder or a hub data set; they are decoded batch by batch.

    Args:
        path: a folder of images in one sub-folder per class, at any depth in it; a Parquet file or glob; or a hub name.
        image: name of the column of images, file names or bytes.
        label: name of the label column, whose cells may be lists; or a list of columns of 0 and 1, one per label; None
            for images without labels, to predict.
        size: height and width that images are resized to, in pixels: one number or two. Other proportions are
            stretched. None for the images' own size, if it is one.
        mode: Pillow mode: ``L`` for grey, ``RGB`` for colour; None for ``RGB`` if an image has colour, else ``L``.
        levels: of images of more than 8 bits, the values that are black and white, such as [0, 65535]; None for the
            least and the greatest value of all images, or those of the checkpoint.
        split: name of a column that says the part of each sample: train, val or test, as sub-folders of these names do.
        group: name of a column whose equal values stay together in a split, such as a patient or a scene.
        separator: what stands between several labels in a cell of text, as in CSV files; None if a cell is one label.
    """

    def __init__(
        self,
        path: str,
        image: str = "image",
        label: list[str] | str | None = "label",
        size: int | list[int] | None = None,
        mode: Literal["L", "RGB"] | None = None,
        split: str | None = None,
        group: str | None = None,
        separator: str | None = None,
        levels: list[float] | None = None,
    ):
        if levels is not None and (len(levels) != 2 or not levels[0] < levels[1]):
            raise InputError(f"data.source.levels {levels}: give two values, black and a greater one for white")
        both = [size, size] if isinstance(size, int) else size
        if both is not None and (len(both) != 2 or min(both) < 1):
            raise InputError(f"data.source.size must be a number of at least 1, or [height, width], got {size}")
        self.path, self.image, self.label, self.size, self.mode = path, image, label, both, mode
        self.split, self.group, self.separator, self.levels = split, group, separator, levels
        self.codes = [*_names(label), *_names(group)]
        refuse_both(split, group)

    def read(self) -> Labelled:  # noqa: D102
        import datasets

        parts, num_val, num_test = load_splits(self.path, "imagefolder", self.split, codes=self.codes)
        for part in parts:
            column(part, self.image, "data.source.image")
        if Path(self.path).expanduser().is_dir() and self.label == "label" and parts[0].column_names == [self.image]:
            fix = "put those of each class into a folder of its name, or give data.source.label null to predict them"
            raise InputError(f"data.source.path {self.path}: its images lie in no folders of classes; {fix}")
        target, names, labels = _labels(parts, self.label, self.separator)
        groups = groups_of(parts, self.group)
        try:
            table = datasets.concatenate_datasets([part.select_columns([self.image]) for part in parts])
            images = Images(table, self.image, self.size, self.mode, self.levels)
        except (TypeError, NotImplementedError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:80]
            raise InputError(f"data.source.image {self.image!r}: holds no images ({reason})") from error
        return Labelled({"pixel_values": images}, target, names, num_test, num_val, groups=groups, labels=labels)

    def take_over(self, facts: Mapping[str, Any]) -> None:  # noqa: D102
        if "pixel_values" in facts["shapes"]:
            channels, *size = facts["shapes"]["pixel_values"]
            self.size = self.size or size
            self.levels = self.levels or facts.get("decoding", {}).get("levels")
            self.mode = self.mode or next((mode for mode, number in CHANNELS.items() if number == channels), None)
        self.codes = self.codes if are_codes(facts["class_names"]) else _names(self.group)

    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:  # noqa: D102
        parts = load_splits(self.path, "imagefolder", self.split, as_written=True, codes=names).parts
        if self.image in names:  # as the name of its file
            import datasets

            parts = [part.cast_column(self.image, datasets.Image(decode=False)) for part in parts]
        found = named_columns(parts, names)
        if self.image in names:
            found[self.image] = [image["path"] for image in found[self.image]]
        return found


class TextTable(Source):
    """Labelled text in CSV, JSONL or Parquet files or a hub data set, tokenized to a fixed length.

    Args:
        path: a file or a glob, a folder with files called train, val and test, or a hub name.
        tokenizer: folder or hub name of a transformers tokenizer.
        text: name of the text column.
        label: name of the label column, whose cells may be lists; or a list of columns of 0 and 1, one per label; None
            for texts without labels, to predict.
        max_length: tokens kept of each text; all are padded to the longest.
        split: name of a column that says the part of each text: train, val or test.
        group: name of a column whose equal values stay together in a split, such as an author.
        separator: what stands between several labels in a cell of text, as in CSV files; None if a cell is one label.
        encoding: of CSV files; None for UTF-8, or UTF-16 where a file says so.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str,
        text: str = "text",
        label: list[str] | str | None = "label",
        max_length: int = 128,
        split: str | None = None,
        group: str | None = None,
        separator: str | None = None,
        encoding: str | None = None,
    ):
        if max_length < 1:
            raise InputError(f"data.source.max_length must be at least 1, got {max_length}")
        self.path, self.tokenizer, self.text, self.label, self.max_length = path, tokenizer, text, label, max_length
        self.known: Mapping[str, Any] = {}  # the tokenizer of a checkpoint
        self.split, self.group, self.separator, self.encoding = split, group, separator, encoding
        self.codes = [*_names(label), *_names(group)]
        refuse_both(split, group)

    def read(self) -> Labelled:  # noqa: D102
        parts, num_val, num_test = load_splits(self.path, split=self.split, codes=self.codes, encoding=self.encoding)
        texts = [value for part in parts for value in column(part, self.text, "data.source.text")]
        _none_missing(texts, "text")
        target, names, labels = _labels(parts, self.label, self.separator)
        tokenizer = load_tokenizer(self.tokenizer, known=self.known)
        made_from = tokenizer_facts(tokenizer, self.max_length)
        inputs = tokenize(tokenizer, texts, self.max_length)
        groups = groups_of(parts, self.group)
        return Labelled(inputs, target, names, num_test, num_val, made_from, groups, labels)

    def take_over(self, facts: Mapping[str, Any]) -> None:  # noqa: D102
        self.known = facts["tokenizer"]
        self.codes = self.codes if are_codes(facts["class_names"]) else _names(self.group)

    def columns(self, names: Sequence[str]) -> dict[str, list[Any]]:  # noqa: D102
        parts = load_splits(self.path, split=self.split, as_written=True, encoding=self.encoding).parts
        return named_columns(parts, names)


def tokenize(tokenizer: Any, texts: Sequence[Any], max_length: int) -> dict[str, Int64[Tensor, "texts time"]]:
    """Texts as a net takes them, padded to the longest, by a tokenizer of transformers.

    Raises:
        InputError: the tokenizer makes nothing of a text.
    """
    settings = {"truncation": True, "max_length": max_length, "padding": "longest", "return_tensors": "pt"}
    encoded = encode_texts(tokenizer, [str(text) for text in texts], **settings)
    if len(nothing := (encoded["attention_mask"].sum(1) == 0).nonzero()[:, 0]):
        problem = f"the tokenizer makes nothing of {len(nothing)} texts, such as {str(texts[int(nothing[0])])[:40]!r}"
        raise InputError(f"data.source.text: {problem}; drop these rows")
    return {key: encoded[key] for key in ("input_ids", "attention_mask")}


def encode_texts(tokenizer: Any, texts: Sequence[Any], **settings: Any) -> Any:
    """What a tokenizer of transformers makes of texts.

    Raises:
        InputError: it cannot encode a word that it does not know.
    """
    try:
        return tokenizer(texts, **settings)
    except Exception as error:  # tokenizers raises nothing narrower
        reason = str(error).splitlines()[0][:60]
        problem = f"cannot encode the texts ({reason})"
        fix = "set unk_token in its tokenizer.json and tokenizer_config.json"
        raise InputError(f"data.source.tokenizer {short_path(tokenizer.name_or_path)!r}: {problem}; {fix}") from error


def load_tokenizer(name: str, in_words: bool = False, known: Mapping[str, Any] | None = None) -> Any:
    """A tokenizer of transformers that can pad.

    Args:
        name: folder or hub name.
        in_words: whether texts are lists of words; some tokenizers know a word by the space before it.
        known: :func:`tokenizer_facts` of a checkpoint, whose tokenizer is taken where the folder is gone.

    Raises:
        InputError: there is none, or it has no token to pad with.
    """
    from transformers import AutoTokenizer

    more = {"add_prefix_space": True} if in_words else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **more)
    except Exception as error:  # damaged files make a reader raise nearly anything
        if known:
            print(f"data.source.tokenizer {name}: is gone; the checkpoint's own is taken", flush=True)
            return made_again(known)
        problem = f"neither a folder with a tokenizer nor a hub name ({str(error).splitlines()[0][:60]})"
        raise InputError(f"data.source.tokenizer {short_path(name)!r}: {problem}") from error
    key = f"data.source.tokenizer {short_path(name)!r}"
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise InputError(f"{key}: has no fast form, which runs keep; name one with a tokenizer.json")
    if len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens):  # transformers makes one of a config.json
        raise InputError(f"{key}: has no files of a tokenizer; save it there, or name another folder")
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        problem = "has no token to pad with, neither pad_token nor eos_token"
        raise InputError(f'{key}: {problem}; set "pad_token" in its tokenizer_config.json to a token that it has')
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # the attention mask hides it
    return tokenizer


def tokenizer_facts(tokenizer: Any, max_length: int) -> dict[str, Any]:
    """What a fast tokenizer of transformers is made from again, as plain values."""
    special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    how = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}  # of its last use
    sides = {side: getattr(tokenizer, side) for side in ("padding_side", "truncation_side")}
    return {"json": json.dumps(how, sort_keys=True), **special, **sides, "model_max_length": max_length}


def made_again(facts: Mapping[str, Any]) -> Any:
    """The tokenizer of transformers that :func:`tokenizer_facts` are of."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    settings = {name: value for name, value in facts.items() if name != "json"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(facts["json"]), **settings)


def refuse_both(split: str | None, group: str | None) -> None:
    """Refuse a column of groups where another says the part of each sample."""
    if split and group:
        raise InputError("data.source.group: the samples are already split by data.source.split; give one of them")


def named_columns(parts: Sequence[Any], names: Sequence[str]) -> dict[str, list[Any]]:
    """Columns of all parts.

    Raises:
        InputError: there is no such column.
    """
    return {name: [value for part in parts for value in column(part, name, "data.keep")[:]] for name in names}


READERS = {
    ".csv": "csv", ".tsv": "csv", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet",
}  # fmt: skip


# The part of a sample by what a column, or a folder, calls it.
PARTS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "dev": 1, "test": 2, "testing": 2}


class Splits(NamedTuple):
    """The splits of a data set that are not empty, training first, and samples in those for validation and testing."""

    parts: list[Any]
    num_val: int
    num_test: int


def load_splits(
    path: str,
    folder_reader: str | None = None,
    split: str | None = None,
    conll: Sequence[str] | None = None,
    as_written: bool = False,
    codes: Sequence[str] = (),
    encoding: str | None = None,
) -> Splits:
    """Load a data set: its train split, and those for validation and testing if there are any.

    pandas reads CSV files, ``datasets`` all others.

    Args:
        path: a file or glob whose ending names its format, a folder, or a hub name.
        folder_reader: the ``datasets`` builder for a folder; None for one with a table for each part.
        split: a column of the train split that says the part of each row, in place of the data set's splits.
        conll: names of the columns of a file in CoNLL format; None for other files.
        as_written: leave the cells of CSV files as their text.
        codes: columns of CSV files whose whole numbers are text if one has leading zeros.
        encoding: of CSV files; None for UTF-8, or UTF-16 where a file says so.

    Raises:
        InputError: the path does not exist, cannot be read, or has no train split; the column does not name parts.
    """
    import datasets
    import pandas
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    datasets.disable_progress_bars()
    local = Path(path).expanduser()
    reader = READERS.get(ending(local)) if conll is None else "conll"
    settings: dict[str, Any] = {} if conll is None else {"column_names": list(conll)}
    try:
        if local.is_dir() and folder_reader and not part_files(local):
            _refuse_padded(local, codes)
            files = _folders(local)
            splits = list_images(local, files) or datasets.load_dataset(
                folder_reader, data_dir=str(local), data_files=files
            )
        elif files := part_files(local):
            if split:
                problem = "the names of the files split the rows already"
                raise InputError(f"data.source.split {split!r}: {problem}; remove it")
            splits = _tables(path, files, codes, as_written, encoding)
        elif reader == "csv" and (found := csv_files(path)):
            rows = pandas.concat(read_csv(path, found, codes, as_written, encoding))
            splits = {"train": datasets.Dataset.from_pandas(rows, preserve_index=False)}
        elif reader and list(local.parent.glob(local.name)):
            splits = datasets.load_dataset(reader, data_files=str(local), **settings)
        elif local.exists():
            kind = "a folder" if local.is_dir() else f"a file of kind {ending(local) or local.name!r}"
            raise InputError(f"data.source.path {path}: is {kind}; name files of kind {', '.join(READERS)}")
        elif reader or path.count("/") != 1 or path.startswith((".", "~")) or Path(path).parent.exists():
            hint = nearest(local.name, (p.name for p in local.parent.glob("*")))
            fix = hint or ("; a hub name is OWNER/NAME" if "/" not in path else "")
            raise InputError(f"data.source.path {path}: no such file{fix}")
        else:
            splits = datasets.load_dataset(path)
    except (DatasetGenerationError, DatasetNotFoundError, ValueError, OSError, OverflowError) as error:
        reason = str(error.__cause__ or error).splitlines()[0][:80]
        raise InputError(f"data.source.path {path}: cannot be read ({reason})") from error
    if "train" not in splits:
        raise InputError(f"data.source.path {path}: has no part named train, only {', '.join(map(str, splits))}")
    parts = [splits.get(name) for name in ("train", "validation", "test")]
    if split is not None:
        of = parts_named(column(splits["train"], split, "data.source.split"), split)
        parts = [splits["train"].select(np.flatnonzero(of == number)) for number in range(3)]
    sizes = [len(part) if part is not None else 0 for part in parts]
    if not sizes[0]:
        raise InputError(f"data.source.path {path}: has no sample to train on")
    return Splits([part for part, size in zip(parts, sizes, strict=True) if size], sizes[1], sizes[2])


def _refuse_padded(folder: Path, codes: Sequence[str]) -> None:
    """Refuse codes in a folder's ``metadata.csv``: ``datasets`` makes numbers of them."""
    for file in folder.rglob("metadata.csv"):
        if found := padded([file], codes):
            name, code = next(iter(found.items()))
            problem = f"{file.name} holds codes such as {code!r} in the column {name!r}, which become numbers there"
            raise InputError(
                f"data.source.path {folder}: {problem}; write metadata.jsonl, or letters before the digits"
            )


def part_files(folder: Path) -> dict[str, Path]:
    """The tables of a folder that are called as parts are, such as ``train.csv``, by part; none if it is no folder.

    Raises:
        InputError: two are of one part, or they are of several kinds.
    """
    found: dict[str, Path] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        name = file.name.lower()
        if (end := ending(file)) in READERS and (number := PARTS.get(name.partition(end)[0])) is not None:
            part = ("train", "validation", "test")[number]
            if part in found:
                raise InputError(f"data.source.path {folder}: {found[part].name} and {file.name} are of one part")
            found[part] = file
    if len({READERS[ending(file)] for file in found.values()}) > 1:
        names = ", ".join(file.name for file in found.values())
        raise InputError(f"data.source.path {folder}: {names} are of several kinds; give files of one kind")
    return found


def _tables(
    path: str, files: Mapping[str, Path], codes: Sequence[str], as_written: bool, encoding: str | None
) -> dict[str, Any]:
    """The tables of parts."""
    import datasets

    reader = READERS[ending(next(iter(files.values())))]
    if reader != "csv":
        return {part: datasets.load_dataset(reader, data_files=str(file))["train"] for part, file in files.items()}
    frames = read_csv(path, list(files.values()), codes, as_written, encoding)
    made = (datasets.Dataset.from_pandas(frame, preserve_index=False) for frame in frames)
    return dict(zip(files, made, strict=True))


def _folders(path: Path) -> dict[str, list[str]]:
    """The files of each split: the folders decide. ``datasets`` would look at the names of files too."""
    names = [each.name for each in path.iterdir() if each.is_dir() and each.name[0] != "."]
    if not names or any(name.lower() not in PARTS for name in names):
        return {"train": ["**"]}
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        found.setdefault(("train", "validation", "test")[PARTS[name.lower()]], []).append(f"{name}/**")
    return found


def parts_named(values: Sequence[Any], name: str) -> np.ndarray:
    """Number of the part, 0 to 2, for each value of a column.

    Raises:
        InputError: a value names no part.
    """
    for value in set(values):
        if str(value).lower() not in PARTS:
            raise InputError(f"data.source.split {name!r}: {value!r} is no part; write train, val or test")
    return np.array([PARTS[str(value).lower()] for value in values])


def hashed(values: Sequence[Any], key: str) -> Int64[Tensor, " samples"]:
    """A number for each value, the same for equal ones; 1 equals 1.0, which a gap makes of it.

    Raises:
        InputError: a value is missing; ``key`` is for messages.
    """
    if missing := sum(value is None or value != value for value in values):
        raise InputError(f"{key}: {missing} of {len(values)} values are missing; fill or drop those rows")
    values = [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]
    digests = (hashlib.blake2b(str(value).encode(), digest_size=8).digest() for value in values)
    return torch.from_numpy(np.frombuffer(b"".join(digests), np.int64).copy())


def groups_of(parts: Sequence[Any], name: str | None) -> Int64[Tensor, " samples"] | None:
    """A number for each value of a column, the same for equal ones; None if no column is named."""
    if name is None:
        return None
    values = [value for part in parts for value in column(part, name, "data.source.group")[:]]
    return hashed(values, f"data.source.group {name!r}")


def column(table: Any, name: str, key: str) -> Sequence[Any]:
    """A column of a table.

    Raises:
        InputError: there is no such column.
    """
    if name not in table.column_names:
        hint = nearest(name, table.column_names)
        raise InputError(f"{key} {name!r}: no such column among {table.column_names}{hint}")
    return table[name]


def _labels(
    parts: Sequence[Any], label: list[str] | str | None, separator: str | None
) -> tuple[Int64[Tensor, "samples *classes"], list[str], Labels]:
    if label is None:
        return torch.full((sum(map(len, parts)),), -1), [], "one"
    names = _names(label)
    found = [[value for part in parts for value in column(part, name, "data.source.label")[:]] for name in names]
    if not isinstance(label, str):
        return *encode_label_columns(names, found), "several"
    values, feature = found[0], parts[0].features[label]
    if separator is not None:
        values = [separated(value, separator) for value in values]
    if any(isinstance(value, list) for value in values):
        return *encode_label_lists(values, getattr(feature, "feature", None)), "several"
    return *encode_labels(values, feature), "one"


def _names(given: list[str] | str | None) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def separated(value: Any, separator: str) -> list[str]:
    """The labels in a cell of text; none in an empty one.

    Raises:
        InputError: the separator is empty.
    """
    if not separator:
        raise InputError("data.source.separator: is empty; give what stands between labels, such as ';'")
    parts = [part.strip() for part in ("" if value is None else str(value)).split(separator)]
    return [part for part in parts if part]


def encode_label_lists(
    values: Sequence[Sequence[Any] | None], feature: Any = None
) -> tuple[Int64[Tensor, "samples classes"], list[str]]:
    """1 for each label of a sample, 0 for all others, and the labels: the feature's own names, else the sorted values.

    Raises:
        InputError: a list is missing, a label is not one text or whole number, or there are fewer than two.
    """
    if missing := sum(value is None for value in values):
        problem = f"{missing} of {len(values)} lists are missing"
        raise InputError(f"data.source.label: {problem}; write [] for a sample without a label, or drop those rows")
    every = [label for value in values for label in value or ()]
    own: list[str] = list(getattr(feature, "names", ()))
    for label in every:
        if isinstance(label, bool) or not isinstance(label, str | int) or (own and label not in range(len(own))):
            raise InputError(f"data.source.label: a list holds {label!r:.40}; each label is one text or whole number")
    values_of = list(range(len(own))) or sorted(set(every))
    if len(values_of) < 2:
        raise InputError(f"data.source.label: its lists hold the labels {values_of}; several labels are at least two")
    numbers = {label: number for number, label in enumerate(values_of)}
    target = torch.zeros(len(values), len(numbers), dtype=torch.int64)
    for row, value in zip(target, values, strict=True):
        row[[numbers[label] for label in value or ()]] = 1
    return target, own or [str(label) for label in values_of]


def encode_label_columns(
    names: Sequence[str], columns: Sequence[Sequence[Any]]
) -> tuple[Int64[Tensor, "samples classes"], list[str]]:
    """Columns of 0 and 1, or of true and false, beside each other, and their names.

    Raises:
        InputError: there are fewer than two, one is named twice, or a value is another.
    """
    if len(set(names)) < max(len(names), 2):
        problem = "several labels are at least two different columns; a single one is named without brackets"
        raise InputError(f"data.source.label {list(names)}: {problem}")
    for name, values in zip(names, columns, strict=True):
        if other := [value for value in values if not isinstance(value, int | float) or value not in (0, 1)]:
            fix = "write 1 where a sample has the label, else 0"
            raise InputError(f"data.source.label {name!r}: {len(other)} values such as {other[0]!r} are neither; {fix}")
    return torch.tensor(columns).T.long(), list(names)


def encode_labels(labels: Sequence[Any], feature: Any) -> tuple[Int64[Tensor, " samples"], list[str]]:
    """Class numbers and names of labels: the feature's own if it is a class label, else the sorted distinct values.

    Raises:
        InputError: a label is missing, or is not one text or number.
    """
    _none_missing(labels, "label")
    if not isinstance(labels[0], str | int | float):
        raise InputError(f"data.source.label: holds {type(labels[0]).__name__}, not one text or number per sample")
    if hasattr(feature, "names"):
        _none_missing([label if label >= 0 else None for label in labels], "label")
        return torch.tensor(list(labels)), list(feature.names)
    values = sorted(set(labels))
    numbers = {value: number for number, value in enumerate(values)}
    return torch.tensor([numbers[label] for label in labels]), [str(value) for value in values]


def _none_missing(values: Sequence[Any], kind: str) -> None:
    if missing := sum(value is None for value in values):
        raise InputError(f"data.source.{kind}: {missing} of {len(values)} {kind}s are missing; fill or drop those rows")
