"""Labelled data read from files that the tests write, and its split by class."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, ByT5Tokenizer, PreTrainedTokenizerFast

from common.errors import InputError, short_path
from common.nets import ConvNet, PretrainedEncoder
from common.sources import IDX, Digits, ImageTable, Labelled, Source, TextTable
from common.sources.files import encode_labels
from common.sources.labelled import keys_of, split_by_class
from recipes.classification.data import ClassificationData
from recipes.classification.words import TaggedWords
from tests.support import write_encoder


@pytest.fixture(autouse=True)
def _cache_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def mistake(source: Source) -> str:
    with pytest.raises(InputError) as caught:
        source.read()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_digits_are_those_of_scikit_learn() -> None:
    read = Digits().read()
    pixels = read.inputs["pixel_values"]
    assert pixels.shape == (1797, 1, 8, 8)
    assert (pixels.min(), pixels.max()) == (0, 1)
    assert torch.bincount(read.target).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (read.class_names, read.num_test) == (list("0123456789"), 0)


# IDX


def idx(values: np.ndarray) -> bytes:
    """The file format of MNIST: two zeros, the type (8: bytes), the number of axes, the axes, the values."""
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    return header + values.astype(np.uint8).tobytes()


def write_idx(folder: Path, zipped: bool, sizes: tuple[int, int] = (20, 7)) -> tuple[np.ndarray, np.ndarray]:
    """A data set of three classes; returns all images and labels, the test's last."""
    folder.mkdir()
    chance = np.random.RandomState(1)
    images = [chance.randint(0, 256, (size, 5, 6)) for size in sizes]
    labels = [chance.randint(0, 3, size) for size in sizes]
    for part, some, their in zip(("train", "t10k"), images, labels, strict=True):
        for name, values in (("images-idx3", some), ("labels-idx1", their)):
            content = idx(values)
            path = folder / f"{part}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)
    return np.concatenate(images), np.concatenate(labels)


@pytest.mark.parametrize("zipped", [True, False])
def test_idx(zipped: bool, tmp_path: Path) -> None:
    images, labels = write_idx(tmp_path / "idx", zipped)
    read = IDX(str(tmp_path / "idx"), ["a", "b", "c"]).read()
    assert torch.equal(read.inputs["pixel_values"], torch.from_numpy(images[:, None] / 255).float())
    assert read.target.tolist() == labels.tolist()
    assert (read.class_names, read.num_test) == (["a", "b", "c"], 7)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[20:40] = bytes(20)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "zipped", "problem"),
    [
        (cut, False, "train-images-idx3-ubyte is no IDX file of 3 axes, or cut short; fetch it again"),
        (cut, True, "train-images-idx3-ubyte.gz is cut short or damaged; fetch it again"),
        (damage, True, "train-images-idx3-ubyte.gz is cut short or damaged; fetch it again"),
        (lambda path: path.write_bytes(b""), False, "train-images-idx3-ubyte is no IDX file of 3 axes, or cut short"),
        (lambda path: path.write_bytes(idx(np.zeros(5))), False, "train-images-idx3-ubyte is no IDX file of 3 axes"),
        (lambda path: path.write_bytes(idx(np.zeros((19, 5, 6)))), False, "19 images of 5x6 but 20 labels"),
        (lambda path: path.write_bytes(idx(np.zeros((20, 5, 5)))), False, "7 images of 5x6 but 7 labels"),
        (Path.unlink, False, "no file train-images-idx3-ubyte[.gz] in"),
    ],
)
def test_idx_mistakes(harm: Callable[[Path], Any], zipped: bool, problem: str, tmp_path: Path) -> None:
    write_idx(tmp_path / "idx", zipped)
    harm(tmp_path / "idx" / f"train-images-idx3-ubyte{'.gz' if zipped else ''}")
    message = mistake(IDX(str(tmp_path / "idx"), ["a", "b", "c"]))
    assert message.startswith("data.source.path")
    assert problem in message


def test_idx_labels_in_the_wrong_part(tmp_path: Path) -> None:
    """As many labels as images in all, but not in each part."""
    folder = tmp_path / "idx"
    write_idx(folder, False)
    (folder / "train-labels-idx1-ubyte").rename(folder / "other")
    (folder / "t10k-labels-idx1-ubyte").rename(folder / "train-labels-idx1-ubyte")
    (folder / "other").rename(folder / "t10k-labels-idx1-ubyte")
    assert "20 images of 5x6 but 7 labels" in mistake(IDX(str(folder), ["a", "b", "c"]))


def test_idx_labels_need_names(tmp_path: Path) -> None:
    write_idx(tmp_path / "idx", False)
    assert "label 2 of" in mistake(IDX(str(tmp_path / "idx"), ["a", "b"]))


# Images


def png(grey: int) -> bytes:
    """An image of 4x4 pixels in one grey."""
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), grey, np.uint8)).save(file, "PNG")
    return file.getvalue()


GREYS = {"cat": (0, 50, 100), "dog": (10, 60)}


def write_images(folder: Path) -> Path:
    """One sub-folder of images per class."""
    for name, greys in GREYS.items():
        (folder / name).mkdir(parents=True)
        for number, grey in enumerate(greys):
            (folder / name / f"{number}.png").write_bytes(png(grey))
    return folder


def greys_of(read: Labelled) -> list[int]:
    pixels = read.inputs["pixel_values"][torch.arange(len(read.target))]
    assert all((image == image.flatten()[0]).all() for image in pixels)
    return (pixels[:, 0, 0, 0] * 255).round().int().tolist()


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_images_in_a_folder(mode: Any, channels: int, tmp_path: Path) -> None:
    read = ImageTable(str(write_images(tmp_path / "pets")), size=6, mode=mode).read()
    assert read.inputs["pixel_values"].shape == (5, channels, 6, 6)
    assert greys_of(read) == [0, 50, 100, 10, 60]
    assert read.target.tolist() == [0, 0, 0, 1, 1]
    assert (read.class_names, read.num_test) == (["cat", "dog"], 0)


def test_a_folder_with_a_test_part(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_images(tmp_path / "pets" / part)
    read = ImageTable(str(tmp_path / "pets"), size=4).read()
    assert read.target.tolist() == [0, 0, 0, 1, 1] * 2
    assert read.num_test == 5


def test_images_in_parquet_files(tmp_path: Path) -> None:
    """As ``datasets`` writes them, as bytes, and as names of files."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    images = [{"bytes": png(grey), "path": None} for grey in (5, 15, 25)]
    folder = tmp_path / "parquet"
    folder.mkdir()
    hub = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 1]}, features=features)
    hub.to_parquet(folder / "a.parquet")
    pq.write_table(pa.table({"pixels": [png(5), png(15), png(25)], "kind": [7, 3, 3]}), folder / "b.parquet")
    pets = write_images(tmp_path / "pets")
    names = [str(pets / "cat/1.png"), str(pets / "dog/0.png")]
    pq.write_table(pa.table({"pixels": names, "kind": ["x", "y"]}), folder / "c.parquet")

    read = ImageTable(str(folder / "a.parquet"), size=4).read()
    assert (greys_of(read), read.target.tolist(), read.class_names) == ([5, 15, 25], [0, 1, 1], ["dog", "cat"])
    read = ImageTable(str(folder / "b.parquet"), "pixels", "kind", size=4).read()
    assert (greys_of(read), read.target.tolist(), read.class_names) == ([5, 15, 25], [1, 0, 0], ["3", "7"])
    read = ImageTable(str(folder / "c.parquet"), "pixels", "kind", size=4).read()
    assert (greys_of(read), read.target.tolist(), read.class_names) == ([50, 10], [0, 1], ["x", "y"])


def test_image_mistakes(tmp_path: Path) -> None:
    table = tmp_path / "table.parquet"
    pq.write_table(pa.table({"image": [b"no picture"] * 3, "label": [1, 2, 3]}), table)
    assert mistake(ImageTable(str(table))).startswith(
        "data.source.image 'image': sample 0 is no image that can be read (Un"
    )
    assert mistake(ImageTable(str(table), image="label")).startswith("data.source.image 'label': holds no images")
    assert mistake(ImageTable(str(table), image="imag")).endswith(
        "data.source.image 'imag': no such column among ['image', 'label']; did you mean 'image'?"
    )
    write_images(tmp_path / "pets/validation")
    assert mistake(ImageTable(str(tmp_path / "pets"))).endswith("has no part named train, only validation")
    assert mistake(ImageTable(str(tmp_path / "./tabel.parquet"))).endswith(
        "no such file; did you mean 'table.parquet'?"
    )
    gap = tmp_path / "gap.parquet"
    pq.write_table(pa.table({"image": [png(5), None], "label": [1, 2]}), gap)
    assert mistake(ImageTable(str(gap))) == "data.source.image 'image': a row has no image; drop it"
    (tmp_path / "nothing").mkdir()
    assert "cannot be read" in mistake(ImageTable(str(tmp_path / "nothing")))
    with pytest.raises(
        InputError, match=r"data.source.size must be a number of at least 1, or \[height, width\], got \[0, 4\]"
    ):
        ImageTable(str(table), size=[0, 4])


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((3, 8, 8), r"^model.net.in_channels is 1, but the images have 3; set it to 3$"),
        ((1, 7, 9), r"^model.net.widths has 3 stages, too many for images of 7x9 pixels$"),
    ],
)
def test_a_net_says_which_images_it_takes(shape: tuple[int, int, int], problem: str) -> None:
    net = ConvNet(2, widths=(4, 4, 4))
    assert net(torch.zeros(1, 1, 8, 8)).shape == (1, 2)
    with pytest.raises(InputError, match=problem):
        net(torch.zeros(1, *shape))


# Text

REVIEWS = [("A good film", "pos"), ("bad", "neg"), ("good good film of a film", "pos"), ("a bad one", "neg")]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_encoder(tmp_path_factory.mktemp("encoder"), [text for text, _ in REVIEWS]))


def write_table(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_text(suffix: str, encoder: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / f"reviews.{suffix}", [{"review": t, "stars": s} for t, s in REVIEWS])
    read = TextTable(path, encoder, "review", "stars").read()
    assert read.target.tolist() == [1, 0, 1, 0]
    assert (read.class_names, read.num_test) == (["neg", "pos"], 0)
    ids, mask = read.inputs["input_ids"], read.inputs["attention_mask"]
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    for (text, _), row, real in zip(REVIEWS, ids, mask.bool(), strict=True):
        assert row[real].tolist() == tokenizer(text)["input_ids"]
        assert (row[~real] == tokenizer.pad_token_id).all()
    assert ids.shape == mask.shape == (4, 6)  # the longest text
    short = TextTable(path, encoder, "review", "stars", max_length=2).read()
    assert torch.equal(short.inputs["input_ids"], ids[:, :2])


def test_text_in_several_files_and_changed_later(encoder: str, tmp_path: Path) -> None:
    for number, (text, label) in enumerate(REVIEWS):
        write_table(tmp_path / f"part{number}.jsonl", [{"text": text, "label": label}])
    assert TextTable(str(tmp_path / "part*.jsonl"), encoder).read().target.tolist() == [1, 0, 1, 0]
    path = write_table(tmp_path / "part0.jsonl", [{"text": "bad", "label": 3}, {"text": "good", "label": 1}])
    assert TextTable(path, encoder).read().class_names == ["1", "3"]
    write_table(tmp_path / "part0.jsonl", [{"text": "bad", "label": 4}])
    assert TextTable(path, encoder).read().class_names == ["4"]


def test_text_mistakes(encoder: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.jsonl", [{"text": "good", "label": 1}, {"text": None, "label": 1}])
    assert mistake(TextTable(path, encoder)) == "data.source.text: 1 of 2 texts are missing; fill or drop those rows"
    path = write_table(tmp_path / "b.jsonl", [{"text": "good", "label": "x"}, {"text": "bad", "label": None}])
    assert mistake(TextTable(path, encoder)).startswith("data.source.label: 1 of 2 labels are missing")
    path = write_table(tmp_path / "c.jsonl", [{"text": "good", "label": {"a": 1}}])
    assert mistake(TextTable(path, encoder)).startswith("data.source.label: holds dict, not one text or number")
    assert mistake(TextTable(path, encoder, label="lable")).endswith("did you mean 'label'?")
    assert mistake(TextTable(path, encoder, text="txt")).endswith("did you mean 'text'?")
    assert mistake(TextTable(str(tmp_path / "c.json"), encoder)).endswith("did you mean 'c.jsonl'?")
    good = write_table(tmp_path / "d.csv", [{"text": "good", "label": "1"}])
    assert "'no/such': neither a folder with a tokenizer" in mistake(TextTable(good, "no/such"))
    (tmp_path / "e.csv").write_text("text,label\n")
    assert mistake(TextTable(str(tmp_path / "e.csv"), encoder)).endswith(
        "e.csv: has no rows; name a file that has some"
    )
    (tmp_path / "f.jsonl").write_text('{"text": "good", "label": 1}\n{"text": oops}\n')
    assert "cannot be read" in mistake(TextTable(str(tmp_path / "f.jsonl"), encoder))
    with pytest.raises(InputError, match=r"data.source.max_length must be at least 1, got 0"):
        TextTable(good, encoder, max_length=0)


def lacking(folder: Path, *, vocab: bool = True, words: bool = False, **special: str) -> str:
    """A folder of a tokenizer without special tokens, or of a net's config alone."""
    if not vocab:
        BertConfig().save_pretrained(folder)
        return str(folder)
    names = {"a": 0, "good": 1, "film": 2, **{token: number for number, token in enumerate(special.values(), 3)}}
    model = models.WordLevel(names) if words else models.BPE(vocab=names, merges=[])
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **special).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, 'no token to pad with, neither pad_token nor eos_token; set "pad_token" in its tokenizer_config.json'),
        ({"words": True, "pad_token": "[PAD]"}, "cannot encode the texts (WordLevel error: Missing [UNK] token from"),
        ({"vocab": False}, "has no files of a tokenizer; save it there, or name another folder"),
        ({"eos_token": "[END]"}, "the tokenizer makes nothing of 1 texts, such as 'zyx'; drop these rows"),
    ],
)
def test_a_tokenizer_that_lacks_something(settings: dict[str, Any], line: str, tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.jsonl", [{"text": "a", "label": 1}, {"text": "zyx", "label": 0}])
    found = mistake(TextTable(path, folder := lacking(tmp_path / "net", **settings)))
    assert line in found
    assert len(found) <= 240
    if "[END]" not in settings.values():
        assert repr(short_path(folder)) in found
        rows = [{"tokens": ["a", "zyx"], "tags": ["O", "X"]}]
        assert line in mistake(TaggedWords(write_table(tmp_path / "b.jsonl", rows), folder))


def test_a_tokenizer_that_is_slow_or_damaged(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.jsonl", [{"text": "a", "label": 1}])
    ByT5Tokenizer().save_pretrained(slow := tmp_path / "slow")
    assert "slow': has no fast form, which runs keep; name one with a tokenizer.json" in mistake(
        TextTable(path, str(slow))
    )
    damaged = Path(lacking(tmp_path / "damaged", pad_token="[PAD]"))
    (damaged / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nope"}}')
    assert "damaged': neither a folder with a tokenizer nor" in mistake(TextTable(path, str(damaged)))


# Labels


def test_labels_are_numbered_in_order() -> None:
    import datasets

    target, names = encode_labels(["b", "a", "b", "c"], None)
    assert (target.tolist(), names) == ([1, 0, 1, 2], ["a", "b", "c"])
    target, names = encode_labels([10, 9, 10], datasets.Value("int64"))
    assert (target.tolist(), names) == ([1, 0, 1], ["9", "10"])
    named = datasets.ClassLabel(names=["z", "a", "unused"])
    target, names = encode_labels([1, 0, 1], named)
    assert (target.tolist(), names) == ([1, 0, 1], ["z", "a", "unused"])
    with pytest.raises(InputError, match=r"data.source.label: 2 of 3 labels are missing"):
        encode_labels([1, -1, -1], named)  # as the hub marks what is not to be known


# The split by class


class Skewed(Source):
    """Three classes of 600, 300 and 100 samples, each numbered by its value; the last ones may be a test part."""

    def __init__(self, num_test: int = 0):
        self.num_test = num_test

    def read(self) -> Labelled:
        target = torch.arange(10).repeat(100).apply_(lambda n: 0 if n < 6 else 1 if n < 9 else 2)
        values = torch.arange(1000.0)[:, None]
        return Labelled({"value": values}, target, ["many", "some", "few"], self.num_test)


def parts_of(data: ClassificationData) -> list[Tensor]:
    """The values of the training, validation and test samples as their data sets give them."""
    data.setup("fit")
    return [
        part[range(len(part))].inputs["value"].flatten().long()
        for part in (data.train_data, data.val_data, data.test_data)
    ]


@pytest.mark.parametrize("num_test", [0, 250])
def test_parts_have_the_classes_in_proportion(num_test: int) -> None:
    data = ClassificationData(Skewed(num_test), val_fraction=0.15, test_fraction=0.25)
    parts = parts_of(data)
    assert [len(part) for part in parts] == [600, 150, 250]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1000))  # all, none twice
    for part in parts:
        counts = torch.bincount(data.samples.labelled.target[part]) / len(part)
        assert torch.allclose(counts, torch.tensor([0.6, 0.3, 0.1]), atol=0.01)
    assert data.class_counts().tolist() == torch.bincount(data.samples.labelled.target[parts[0]]).tolist()
    if num_test:
        assert torch.equal(parts[2], torch.arange(750, 1000))  # the source's own, in its order
    batch = data.train_data[[3, 1]]
    assert batch.target.tolist() == data.samples.labelled.target[parts[0][[3, 1]]].tolist()


def test_its_own_seed_decides_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the run's: no run may test on what another has trained on."""
    splits = []
    for run_seed, split_seed in (("1", 0), ("2", 0), ("2", 1)):
        monkeypatch.setenv("PL_GLOBAL_SEED", run_seed)
        torch.rand(3)
        splits.append(parts_of(ClassificationData(Skewed(), split_seed=split_seed)))
    assert all(torch.equal(a, b) for a, b in zip(splits[0], splits[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(splits[0], splits[2], strict=True))


@pytest.mark.parametrize(
    ("val", "test", "problem"),
    [
        (0.0, 0.2, "^data.val_fraction must be above 0 and below 1, got 0.0$"),
        (0.2, 0.0, "^data.test_fraction must be above 0 and below 1, got 0.0$"),
        (0.5, 0.5, "^data.val_fraction 0.5 and data.test_fraction 0.5 must leave samples to train on$"),
        (-0.1, 0.2, "^data.val_fraction must be above 0 and below 1, got -0.1$"),
        (0.2, 1.1, "^data.test_fraction must be above 0 and below 1, got 1.1$"),
    ],
)
def test_fractions_must_leave_samples(val: float, test: float, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        ClassificationData(Skewed(), val_fraction=val, test_fraction=test)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_not_laid_on_the_data(seed: int) -> None:
    with pytest.raises(InputError, match=rf"^data.split_seed must be in \[0, 2\*\*32\), got {seed}$"):
        ClassificationData(Skewed(), split_seed=seed)


def test_a_class_of_two_cannot_be_split(encoder: str, tmp_path: Path) -> None:
    rows = [{"text": "good", "label": label} for label in ["a"] * 20 + ["b"] * 2]
    source = TextTable(write_table(tmp_path / "rare.csv", rows), encoder)
    with pytest.raises(InputError, match=r"data.source: class 'b' has 2 samples; a split needs at least 3"):
        ClassificationData(source)


def test_a_part_too_small_for_the_classes_is_refused() -> None:
    with pytest.raises(InputError, match=r"data.source: .* cannot be split by class"):
        ClassificationData(Skewed(), val_fraction=0.001)


def test_files_of_other_kinds_are_named(encoder: str, tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_text("text label")
    assert mistake(TextTable(str(tmp_path / "rows.xlsx"), encoder)).endswith(
        "rows.xlsx: is a file of kind '.xlsx'; name files of kind .csv, .tsv, .jsonl, .ndjson, .json, .parquet"
    )
    assert "is a folder; name files of kind .csv" in mistake(TextTable(str(tmp_path), encoder))
    path = Path(write_table(tmp_path / "rows.csv", [{"text": t, "label": s} for t, s in REVIEWS]))
    assert len(TextTable(str(path.rename(tmp_path / "ROWS.CSV")), encoder).read().target) == 4


def test_texts_are_padded_by_tokenizers_without_a_sign_for_it(encoder: str, tmp_path: Path) -> None:
    """The mask says what is padding."""
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    tokenizer.pad_token, tokenizer.eos_token = None, "[UNK]"
    tokenizer.save_pretrained(tmp_path / "other")
    path = write_table(tmp_path / "reviews.csv", [{"text": t, "label": s} for t, s in REVIEWS])
    expected, read = (TextTable(path, name).read() for name in (encoder, str(tmp_path / "other")))
    mask = read.inputs["attention_mask"]
    assert torch.equal(mask, expected.inputs["attention_mask"])
    assert torch.equal(read.inputs["input_ids"] * mask, expected.inputs["input_ids"] * mask)


def test_texts_longer_than_an_encoder_has_positions_for(encoder: str) -> None:
    net, ids = PretrainedEncoder(2, encoder), torch.ones(1, 65, dtype=torch.long)
    with pytest.raises(InputError, match=r"data.source.max_length 65 exceeds max_position_embeddings 64 of model.net"):
        net(ids, ids)


@pytest.mark.parametrize(
    ("classes", "fractions", "problem"),
    [
        (1, (0.1, 0.2), r"data.source.label: '0' is the only class; there is nothing to tell apart"),
        (2, (float("nan"), 0.2), r"data.val_fraction must be above 0 and below 1, got nan"),
    ],
)
def test_what_cannot_be_split(classes: int, fractions: tuple[float, float], problem: str) -> None:
    data = Labelled({"x": torch.zeros(20, 1)}, torch.arange(20) % classes, [str(n) for n in range(classes)])
    with pytest.raises(InputError, match=problem):
        split_by_class(data, *fractions, 0, keys_of(data))
