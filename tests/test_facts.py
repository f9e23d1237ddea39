"""A run carries what it learnt from its data: commands take the checkpoint's tokenizer and class numbers, or refuse."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from common.checkpoint import keys_as_known, relabelled
from common.errors import InputError
from common.sources import Labelled
from common.sources.labelled import Parts, as_known, keys_of, parts_facts, same_parts, sample_numbers
from common.sources.tables import Table, split_rows
from tests.support import ROOT, TINY, main_of, refused, write_encoder

FIT = [*TINY, "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
BPE = ["--data.tokenizer", "common.sources.tokenizers.BPE", "--data.tokenizer.vocab_size", "300"]
NET = "--model.config.init_args"
SMALL = [
    *BPE, "--data.context", "32", f"{NET}.hidden_size", "32", f"{NET}.intermediate_size", "64",
    f"{NET}.num_hidden_layers", "1", f"{NET}.num_attention_heads", "2",
]  # fmt: skip

# Their data modules do the same.
LABELLED = [
    "classification",
    *(pytest.param(name, marks=pytest.mark.matrix) for name in ("adversarial", "distillation")),
]

pytestmark = pytest.mark.usefixtures("no_report")


def add_images(folder: Path, names: str, count: int, first: int = 0) -> None:
    """Images of noise for each class; equal numbers make equal images."""
    for kind, name in enumerate(names.split()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(first, first + count):
            pixels = np.random.default_rng([kind, number]).integers(0, 255, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.png")


@pytest.mark.parametrize("recipe", ["lm", pytest.param("curriculum", marks=pytest.mark.matrix)])
def test_the_tokenizer_of_a_run_stays(
    recipe: str, work: Path, small_text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where its text has grown, and without the text."""
    texts = work / "texts"
    texts.mkdir()
    shutil.copy(small_text, texts / "first.txt")
    more = ["--model.sample_tokens", "4"] if recipe == "lm" else []
    fitted = main_of(recipe)(["fit", *FIT, *SMALL, *more, "--data.path", str(texts)])
    tokenizer = fitted.datamodule.tokenizer.to_str()
    (texts / "second.txt").write_text("zyx wvu " * 2000)
    tested = main_of(recipe)(["test", "--trainer.limit_test_batches", "1"]).datamodule
    assert tested.corpus.tokenizer.to_str() == tested.tokenizer.to_str() == tokenizer
    goes_on = ["fit", "--ckpt_path", "last", "--trainer.max_steps", "6"]
    said = "documents: 2 for train (1 before), 1 for val (1 before); those that it knew stay in"
    assert f"{said} their parts\n" in capfd.readouterr().out
    assert main_of(recipe)(goes_on).datamodule.corpus.tokenizer.to_str() == tokenizer
    assert "the checkpoint was trained with BPE {'vocab_size': 300}, and this is another; remove it" in refused(
        recipe, ["test", "--data.tokenizer.vocab_size", "400"], capfd
    )
    assert (
        "val_fraction: 0.3: the checkpoint's text was split by 0.1, and its parts hold; give 0.1, or begin a"
        in refused(recipe, ["test", "--data.val_fraction", "0.3"], capfd)
    )
    own = main_of(recipe)(["test", "--data.test_path", str(texts / "second.txt")]).datamodule
    assert own.corpus.documents == {"train": 1, "val": 1, "test": 1, "duplicates": 1}
    shutil.rmtree(texts)
    for command in ("predict", "export") if recipe == "lm" else ("export",):
        assert main_of(recipe)([command]).datamodule.tokenizer.to_str() == tokenizer


def test_another_text_to_test_on_is_said(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its documents are fewer, and none of them is one that the checkpoint knows."""
    rows = [json.dumps({"text": f"row {number} of a text, " * 5}) for number in range(60)]
    Path("my.jsonl").write_text("\n".join(rows))
    Path("held.txt").write_text("Another text. " * 300)
    main_of("lm")(["fit", *FIT, *SMALL, "--model.sample_tokens", "0", "--data.path", "my.jsonl"])
    capfd.readouterr()
    main_of("lm")(["test", "--data.path", "held.txt"])
    line = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("data.path"))
    assert line.endswith("those that it knew stay in their parts; data.test_path tests on the whole of another text")
    assert "documents: 1 for train (5" in line
    assert len(line) <= 240 - 23  # there is room for counts of seven digits


def test_a_text_to_test_on_that_was_trained_on_is_said(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By its documents; one that the training has left out for testing, or for validation, is none."""
    texts, held = work / "texts", work / "held"
    held.mkdir()
    texts.mkdir()
    for number in range(30):
        (texts / f"{number}.txt").write_text(f"Text {number} has words. " * 50)
    args = ["fit", *FIT, *SMALL, "--model.sample_tokens", "0", "--data.path", str(texts)]
    corpus = main_of("lm")(args).datamodule.corpus
    parts = [corpus.tokenizer.decode(tokens.tolist()) for tokens in (corpus.train, corpus.val)]
    train, val = ([number for number in range(30) if f"Text {number} has" in part] for part in parts)
    for number in (*train[:2], val[0]):
        shutil.copy(texts / f"{number}.txt", held)
    (held / "new.txt").write_text("Another text. " * 300)
    main_of("lm")([*args, "--name", "apart", "--data.test_path", str(held)])
    test = ["test", "--data.test_path", str(held)]
    for more, was in (([], "was"), (["--name", "apart"], ""), ([], "may have been")):
        if was == "may have been":
            (texts / "more.txt").write_text("One text more. " * 300)
        capfd.readouterr()
        main_of("lm")([*test, *more])
        said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("data.")]
        assert said[:1] == [f"data.test_path: the net {was} trained with 2 of its 4 documents"] * bool(was)
        assert len(said) == (was == "may have been") + bool(was)
    assert said[1].endswith("; others that it knew stay in their parts")
    capfd.readouterr()
    main_of("lm")(["test", "--name", "apart", "--data.test_path", "null"])
    assert f"samples of {texts} for validation, as none are for testing\n" in capfd.readouterr().out


def test_texts_need_the_folder_of_their_tokenizer_once(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [f"a {'very ' * (n % 3)}{word} film,{word}" for n in range(20) for word in ("good", "bad")]
    (work / "reviews.csv").write_text("\n".join(["text,label", *rows]))
    write_encoder(work / "net", rows)
    preset = ["--config", str(ROOT / "recipes/classification/text.yaml"), "--data.source.path", "reviews.csv"]
    main_of("classification")(["fit", *preset, *FIT, "--data.source.tokenizer", "./net", "--model.net.name", "./net"])
    losses = []
    for folder in ("net", "gone"):
        cli = main_of("classification")(["test"])
        losses.append(cli.trainer.callback_metrics["test/loss"].item())
        if folder == "net":
            shutil.move(work / "net", work / "gone")
    assert losses[0] == losses[1]
    assert "data.source.tokenizer ./net: is gone; the checkpoint's own is taken" in capfd.readouterr().out


@pytest.mark.parametrize("recipe", LABELLED)
def test_more_data_move_no_sample(recipe: str, work: Path) -> None:
    """Of a run that goes on, is tested, and goes on again."""
    images = work / "images"
    add_images(images, "ape bee cat", 20)
    source: list[Any] = ["--data.source", "common.sources.ImageTable", "--data.source.path", str(images)]
    net = ["--model.teacher", "null"] if recipe == "distillation" else []
    args = [*source, "--data.source.size", "8", *net, "--data.batch_size", "4"]
    before = parts_of(main_of(recipe)(["fit", *FIT, *args]).datamodule)
    same = main_of(recipe)(["test", "--trainer.limit_test_batches", "1"]).datamodule
    assert parts_of(same) == before
    for step, count in ((6, 10), (8, 7)):
        add_images(images, "ape bee cat", count, first=step * 10)
        goes_on = ["fit", "--ckpt_path", "last", "--trainer.max_steps", str(step)]
        for command in (["test", "--ckpt_path", "last", "--trainer.limit_test_batches", "1"], goes_on):
            after = parts_of(main_of(recipe)(command).datamodule)
            assert all(old <= new for old, new in zip(before, after, strict=True))
            assert sum(map(len, after)) > sum(map(len, before))
        before = after


def parts_of(data: Any) -> list[set[int]]:
    keys = keys_of(data.samples.labelled)
    return [set(keys[positions].tolist()) for positions in data.samples.parts]


@pytest.mark.parametrize("recipe", LABELLED)
def test_classes_go_by_their_names(recipe: str, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One that is gone changes no number; one that is new or renamed is refused."""
    images = work / "images"
    add_images(images, "ape bee cat", 20)
    source: list[Any] = ["--data.source", "common.sources.ImageTable", "--data.source.path", str(images)]
    net = ["--model.teacher", "null"] if recipe == "distillation" else []
    main_of(recipe)(["fit", *FIT, *source, "--data.source.size", "8", *net, "--data.batch_size", "4"])
    args = ["predict", "--data.predict_source", "common.sources.ImageTable"]
    args += ["--data.predict_source.path", str(images), "--data.predict_source.mode", "RGB"]
    args += ["--data.predict_source.size", "[28, 20]"]
    line = refused(recipe, args, capfd)
    assert "images are 3x28x20, and those of the training 1x8x8 (channels x height x width); set its size" in line
    shutil.move(images / "ape", work / "ape")
    capfd.readouterr()
    data = main_of(recipe)(["test", "--trainer.limit_test_batches", "1"]).datamodule
    said = "data.source: 20 of the checkpoint's 60 samples are gone, and none of class 'ape' is left; all others stay"
    assert said in capfd.readouterr().out.splitlines()
    assert data.class_names == ["ape", "bee", "cat"]
    assert set(data.samples.labelled.target.tolist()) == {1, 2}
    shutil.move(work / "ape", images / "apes")
    line = refused(recipe, ["test"], capfd)
    assert "data.source: the checkpoint was not trained on a class 'apes'; did you mean 'ape'?" in line


@pytest.mark.parametrize("recipe", LABELLED)
def test_without_the_data_of_training(recipe: str, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images = work / "images"
    add_images(images, "ape bee", 20)
    source: list[Any] = ["--data.source", "common.sources.ImageTable", "--data.source.path", str(images)]
    net = ["--model.teacher", "null"] if recipe == "distillation" else []
    main_of(recipe)(["fit", *FIT, *source, "--data.source.size", "8", *net, "--data.batch_size", "4"])
    shutil.move(images, work / "new")
    main_of(recipe)(["export"])
    assert (work / f"runs/{recipe}/default/export/model.safetensors").exists()
    args = ["--data.predict_source", "common.sources.ImageTable", "--data.predict_source.path", str(work / "new")]
    args += ["--data.predict_source.size", "8", "--trainer.limit_predict_batches", "1.0"]
    main_of(recipe)(["predict", *args, "--data.keep", "[image]"])
    with (work / f"runs/{recipe}/default/predict/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["image"] for row in rows} == {str(path) for path in (work / "new").glob("*/*.png")}
    line = refused(recipe, ["predict", *args, "--data.keep", "[imge]"], capfd)
    assert "'imge': no such column among ['image', 'label']; did you mean 'image'?" in line
    args[3] = "nw"
    line = refused(recipe, ["predict", *args, "--data.keep", "[image]"], capfd)
    assert line.startswith("--data.predict_source.path: nw: no such file")


def places_of(data: Any) -> Counter[tuple[int, int]]:
    """How many samples of equal images are in each part."""
    keys = keys_of(data.samples.labelled)
    return Counter((key, number) for number, part in enumerate(data.samples.parts) for key in keys[part].tolist())


@pytest.mark.parametrize(
    ("recipe", "alike"),
    [
        ("classification", True),
        *(
            pytest.param(name, False, marks=pytest.mark.matrix)
            for name in ("classification", "adversarial", "distillation")
        ),
    ],
)
def test_changed_labels_are_said(recipe: str, alike: bool, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By all commands, until a checkpoint knows them; in no case does a sample change its part.

    Where most images are alike, what tells them apart is their label.
    """
    images = work / "images"
    add_images(images, "ape bee cat", 20)
    for path in images.glob("*/*.png") if alike else ():
        if path.stem > "001":
            shutil.copy(path.with_name("000.png"), path)
    source: list[Any] = ["--data.source", "common.sources.ImageTable", "--data.source.path", str(images)]
    source += ["--data.source.size", "8", *(["--model.teacher", "null"] if recipe == "distillation" else [])]
    args = ["fit", *FIT, *source, "--data.batch_size", "4"]
    before = main_of(recipe)(args).datamodule
    moved = ["001", "005", "006"] if alike else ["001"]
    for name in moved:
        shutil.move(images / f"ape/{name}.png", images / f"bee/x{name}.png")
    said = f"{len(moved)} samples have another label than the checkpoint knows, such as …"
    for command in (["test"], [*args, "--init_from", "default", "--name", "next"], ["fit", "--ckpt_path", "last"]):
        capfd.readouterr()
        goes_on = ["--trainer.max_steps", "6"] if "last" in command else []
        after = main_of(recipe)([*command, *goes_on]).datamodule
        out = capfd.readouterr().out
        line = next(line for line in out.splitlines() if "another label" in line)
        assert len(line) <= 240
        assert said.removesuffix("…") in line
        assert "bee/x001.png ('bee' now, 'ape' before); the present ones count, and all stay in their parts" in line
        assert "new to the checkpoint" not in out
        assert places_of(after) == places_of(before)
    main_of(recipe)(["test", "--ckpt_path", "last"])
    assert "another label" not in capfd.readouterr().out


@pytest.mark.parametrize("equal_together", [True, False])
def test_equal_samples_change_their_labels(equal_together: bool) -> None:
    """As many as do are told, and no sample counts as new that has another label."""
    inputs, parts = torch.tensor([7, 7, 7, 8, 9, 9]), Parts(*torch.arange(6).split(2))

    def numbers(labels: list[int]) -> dict[str, torch.Tensor]:
        return sample_numbers(Labelled({}, torch.tensor(labels), ["a", "b", "c"]), inputs, equal_together)

    then = parts_facts(numbers([0, 0, 0, 1, 2, 2]), parts)
    for labels, changed in (([0, 1, 1, 1, 2, 2], [1, 2]), ([1, 0, 0, 1, 2, 0], [0, 5]), ([0, 0, 0, 1, 2, 2], [])):
        now = numbers(labels)
        found = relabelled(now, then)
        assert found.nonzero()[:, 0].tolist() == changed
        keys = keys_as_known(found, now, then)
        assert sorted(keys.tolist()) == sorted(then["keys"].tolist())


def test_a_new_label_changes_no_sample() -> None:
    """Of several per sample, whatever is the longest list of them."""
    inputs = torch.arange(10) * 256
    target = (torch.arange(30).reshape(10, 3) % 4 == 0).long()
    old = Labelled({}, target, ["a", "b", "c"], labels="several")
    more = torch.cat([target[:, :1], torch.zeros(10, 1).long(), target[:, 1:]], 1)
    new = as_known(Labelled({}, more, ["a", "ab", "b", "c"], labels="several"), ["a", "b", "c"], may_grow=True)
    assert new.target.shape == (10, 4)
    then, now = sample_numbers(old, inputs, True), sample_numbers(new, inputs, True)
    assert torch.equal(then["labelled"], now["labelled"])
    assert len(now["labelled"].unique()) == 10
    new.target[3, 3] = 1
    assert relabelled(sample_numbers(new, inputs, True), then).nonzero()[:, 0].tolist() == [3]


def test_equal_samples_go_together(work: Path) -> None:
    """Of each image there are three."""
    images = work / "images"
    generator = np.random.default_rng(4)
    for name in ("ape", "bee"):
        (images / name).mkdir(parents=True)
        for number in range(60):
            pixels = generator.integers(0, 255, (8, 8), dtype=np.uint8) if number % 3 == 0 else pixels
            Image.fromarray(pixels).save(images / name / f"{number:02d}.png")
    source: list[Any] = ["--data.source", "common.sources.ImageTable", "--data.source.path", str(images)]
    data = main_of("classification")(["fit", *FIT, *source, "--data.source.size", "8", "--data.batch_size", "4"])
    parts = parts_of(data.datamodule)
    assert [len(part) for part in parts] == [28, 4, 8]
    assert not (parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2])
    assert [len(part) for part in data.datamodule.samples.parts] == [84, 12, 24]


# The package datasets leaves metadata.csv open.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_folders_and_columns_split_images(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Sub-folders train, val and test; a column of groups in the folder's metadata.csv."""
    for part, count, first in (("train", 20, 0), ("val", 6, 20), ("test", 8, 40)):
        add_images(work / "parts" / part, "ape bee", count, first)
    source = [*FIT, "--data.source", "common.sources.ImageTable", "--data.source.size", "8", "--data.batch_size", "4"]
    args = ["fit", *source, "--data.source.path"]
    data = main_of("classification")([*args, str(work / "parts")]).datamodule
    assert [len(part) for part in data.samples.parts] == [40, 12, 16]
    shutil.move(work / "parts/test/ape/041.png", work / "parts/train/ape/moved.png")
    assert "that the checkpoint knows are in another part now" in refused("classification", ["test"], capfd)
    add_images(work, "scenes", 60)
    lines = ["file_name,label,scene"]
    lines += [f"{number:03d}.png,{'ape' if number % 2 else 'bee'},{number // 4}" for number in range(60)]
    (work / "scenes/metadata.csv").write_text("\n".join(lines))
    data = main_of("classification")([*args, str(work / "scenes"), "--data.source.group", "scene"]).datamodule
    scenes = [{int(position) // 4 for position in part} for part in data.samples.parts]
    assert sum(map(len, scenes)) == len(set.union(*scenes)) == 15


def test_known_samples_keep_their_order() -> None:
    """A run that goes on reads the same batches, whatever has been added before."""
    keys = torch.tensor([5, 3, 8, 1, 9])
    known = parts_facts({"keys": keys}, Parts(torch.tensor([2, 0, 1]), torch.tensor([4]), torch.tensor([3])))
    more = torch.tensor([1, 7, 8, 9, 3, 5])
    drawn = Parts(torch.tensor([0, 1, 2]), torch.tensor([3, 4]), torch.tensor([5]))
    parts = same_parts(more, drawn, known)
    assert [more[part].tolist() for part in parts] == [[8, 5, 3, 7], [9], [1]]


@pytest.mark.parametrize("moved", [0, 5])
def test_a_sample_that_the_user_moved_is_refused(moved: int) -> None:
    """From training to a test part of the source's own, and back; sizes alone may have changed, not the order."""
    keys = torch.arange(10)
    parts = Parts(torch.arange(6), torch.arange(6, 8), torch.arange(8, 10))
    train, test = parts.train, parts.test
    if moved:
        now = Parts(train[:-1], parts.val, torch.cat([train[-1:], test]))
    else:
        now = Parts(torch.cat([train, test[:1]]), parts.val, test[1:])
    with pytest.raises(InputError, match="1 samples that the checkpoint knows are in another part now; put them back"):
        same_parts(keys, now, parts_facts({"keys": keys}, parts), own=[1, 2])


def test_keys_of_texts_do_not_hang_on_the_longest() -> None:
    ids, mask = torch.tensor([[4, 5, 0], [6, 0, 0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    wide = torch.nn.functional.pad(ids, (0, 2), value=1), torch.nn.functional.pad(mask, (0, 2))
    keys = [
        keys_of(Labelled({"input_ids": i, "attention_mask": m}, torch.tensor([0, 1]), ["a", "b"])).tolist()
        for i, m in ((ids, mask), wide)
    ]
    assert keys[0] == keys[1]
    assert keys[0][0] != keys[0][1]


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (["13/01/2024", "02/03/2024", "2024-02-25"] * 20, "may begin with the day or with the month; write dates as"),
        (["03.01.2024 10:00", "04.01.2024 10:00"] * 30, "may begin with the day or with the month; write dates as"),
        (["2024-02-25", "2024-02-25 at noon"] * 30, "neither a number nor a date as the others"),
        ([1.0, None, 3.0] * 20, "20 of 60 values are missing; fill or drop those rows"),
        ([1] * 60, "too many rows have the same time; take another column"),
    ],
)
def test_times_that_give_no_order(values: list[Any], line: str) -> None:
    source = Table("rows.csv", target="y", time="when")
    frame = pandas.DataFrame({"y": range(60), "when": values})
    with pytest.raises(InputError, match=line):
        split_rows(frame, source, 0.2, 0.2, 0)


def test_facts_come_from_a_checkpoint_of_the_same_kind(
    work: Path, small_text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    main_of("classification")(["fit", *FIT])
    args = ["fit", *FIT, *SMALL, "--data.path", str(small_text), "--data.facts_of"]
    assert refused("lm", [*args, "nope.ckpt"], capfd) == (
        "--data.facts_of: no such checkpoint nope.ckpt; name one, or null"
    )
    line = refused("lm", [*args, "runs/classification/default/checkpoints/last.ckpt"], capfd)
    assert line == "--data.facts_of: the checkpoint is of no text and has no tokenizer; name another, or null"
    damaged = bytearray(Path("runs/classification/default/checkpoints/last.ckpt").read_bytes())
    damaged[len(damaged) // 2] ^= 16
    Path("damaged.ckpt").write_bytes(damaged)
    line = refused("classification", ["fit", *FIT, "--data.facts_of", "damaged.ckpt"], capfd)
    assert "damaged.ckpt: cut short, damaged or no checkpoint; name another with --data.facts_of" in line
