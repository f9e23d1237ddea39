"""Images in files: what is read of them and when, mode and size from the data, damage, and exact resume."""

import io
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import common.sources.images as images_module
from common.data import step_seed
from common.errors import InputError
from common.sources import ImageTable
from common.sources.images import Images, decode, list_images
from common.sources.labelled import LabelledDataset, Samples, fingerprint, keys_of
from common.sources.memory import unlabelled
from recipes.multitask.pairs import draw_pairs
from tests.support import PLAIN, ROOT, logs, main_of, read_metrics, run_ranks

pytestmark = pytest.mark.usefixtures("no_report")


def noise(number: int, *shape: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, shape, dtype=np.uint8))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Of several formats, sizes and modes, one turned by its camera."""
    folder = tmp_path / "mixed"
    for name in ("ape", "bee"):
        (folder / name).mkdir(parents=True)
    turned = Image.Exif()
    turned[Image.ExifTags.Base.Orientation] = 6
    noise(0, 9, 12).save(folder / "ape/grey.png")
    noise(1, 9, 12, 3).save(folder / "ape/colour.PNG")
    noise(2, 9, 12, 3).save(folder / "ape/turned.jpg", exif=turned)
    noise(3, 7, 5, 3).quantize(16).save(folder / "bee/palette.gif")
    noise(4, 9, 12, 4).save(folder / "bee/alpha.png")
    noise(5, 30, 20, 3).save(folder / "bee/large.webp")
    return folder


def everything(images: Any) -> torch.Tensor:
    return images[torch.arange(len(images))]


@pytest.mark.parametrize(("mode", "size"), [("L", 6), ("RGB", 6), ("RGB", [12, 8])])
def test_pixels_are_those_of_each_file(mixed: Path, mode: Any, size: Any) -> None:
    """Read, turned, converted, resized and scaled one by one."""
    read = ImageTable(str(mixed), size=size, mode=mode).read().inputs["pixel_values"]
    height, width = [size, size] if isinstance(size, int) else size
    wanted = []
    for path in sorted(map(str, mixed.glob("*/*"))):
        value = {"path": path, "bytes": Path(path).read_bytes()}
        image: Any = datasets.Image().decode_example(value)
        if image.mode == "RGBA":
            pixels = np.asarray(image, np.float64)
            over = 255 + (pixels[..., :3] - 255) * pixels[..., 3:] / 255  # white
            image = Image.fromarray(np.rint(over).astype(np.uint8))
        image = image.convert(mode).resize((width, height))
        array = np.asarray(image, np.float32) / 255
        wanted.append(torch.from_numpy(array.reshape(height, width, -1)).permute(2, 0, 1))
    found = everything(read)
    is_alpha = torch.arange(6) == 3  # which Pillow lays over white in whole numbers
    assert torch.equal(found[~is_alpha], torch.stack(wanted)[~is_alpha])
    assert torch.allclose(found, torch.stack(wanted), rtol=0, atol=1.01 / 255)
    assert found.is_contiguous()
    assert found.shape == read.shape
    facts = {"shapes": {"pixel_values": [*found.shape[1:]]}, "range": [0.0, 1.0], "class_names": ["ape", "bee"]}
    pictures = [Image.open(io.BytesIO(Path(path).read_bytes())) for path in sorted(map(str, mixed.glob("*/*")))]
    assert torch.equal(unlabelled(pictures, facts)[range(6)].inputs["pixel_values"], found)
    deep = Image.fromarray(np.full((9, 12), 40_000, np.uint16))
    assert unlabelled([pictures[0], deep], facts)[[1]].inputs["pixel_values"].unique() == np.float32(156) / 255
    known = facts | {"decoding": {"levels": [39_950.0, 40_050.0]}}
    assert unlabelled([pictures[0], deep], known)[[1]].inputs["pixel_values"].unique() == np.float32(128) / 255
    with pytest.raises(InputError, match="32 bits is not known; save 16 bits"):
        unlabelled([pictures[0], Image.fromarray(np.full((9, 12), 40_000, np.int32))], facts)
    with pytest.raises(InputError, match="and in training 0 to 1; scale them alike"):
        unlabelled(found * 2 - 1, facts)
    with pytest.raises(InputError, match="the net was trained on tagged words"):
        unlabelled(["a text"], {"labels": "words"})
    assert torch.equal(read[torch.tensor([[4, 0, 4]])], found[[4, 0, 4]][None])


def test_pixels_are_read_when_a_batch_asks(mixed: Path) -> None:
    data = ImageTable(str(mixed), size=6).read()
    batches = LabelledDataset(data, torch.tensor([0, 2, 5]))
    before = batches[[2, 0]].inputs["pixel_values"]
    (mixed / "bee/alpha.png").unlink()  # the third by name
    assert torch.equal(batches[[2, 0]].inputs["pixel_values"], before)
    with pytest.raises(InputError, match=r"image': .*/bee/alpha.png is no image that can be read \(FileNotFound"):
        everything(data.inputs["pixel_values"])


def test_a_folder_is_listed_as_by_the_package_datasets(mixed: Path, tmp_path: Path) -> None:
    for name in (".hidden/a.png", "__cache__/a.png", "ape/.b.png", "ape/notes.txt"):
        (mixed / name).parent.mkdir(exist_ok=True)
        shutil.copy(mixed / "ape/grey.png", mixed / name)
    for name in ("train", "test", "testing"):
        shutil.copytree(mixed, tmp_path / "parts" / name)
    several = {"train": ["train/**"], "test": ["test/**", "testing/**"]}
    for folder, parts in (
        (mixed, {"train": ["**"]}),
        (tmp_path / "parts", several),
        (mixed / "ape", {"train": ["**"]}),
    ):
        ours: Any = list_images(folder, parts)
        theirs: Any = datasets.load_dataset("imagefolder", data_dir=str(folder), data_files=parts)
        assert {*ours} == {*theirs}
        for part in ours:
            assert ours[part].features == theirs[part].features
            assert ours[part].data.to_pydict() == theirs[part].data.to_pydict()
    (mixed / "metadata.csv").write_text("file_name,kind\nape/grey.png,1\n")
    assert list_images(mixed, {"train": ["**"]}) is None


@pytest.mark.parametrize(
    ("kept", "mode", "shape", "said"),
    [
        ("ape/grey.png", "L", [1, 9, 12], "1 images, read as L (none has colour) at 9x12 pixels (height x width)"),
        ("*/[gca]*.[pP]*", "RGB", [3, 9, 12], "3 images, read as RGB (2 have colour) at 9x12 pixels"),
        ("ape/turned.jpg", "RGB", [3, 12, 9], "1 images, read as RGB (1 have colour) at 12x9 pixels"),
    ],
)
def test_mode_and_size_come_from_the_data(
    mixed: Path, kept: str, mode: str, shape: list[int], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for path in {*mixed.glob("*/*")} - {*mixed.glob(kept)}:
        path.unlink()
    images = ImageTable(str(mixed), label=None).read().inputs["pixel_values"]
    assert (images.mode, list(images.shape[1:])) == (mode, shape)
    assert everything(images).shape == images.shape
    assert capfd.readouterr().out.startswith(f"data.source: {said}")
    ImageTable(str(mixed), label=None, mode="L", size=4).read()
    assert not capfd.readouterr().out


def test_images_that_leave_a_question(mixed: Path) -> None:
    with pytest.raises(InputError) as error:
        ImageTable(str(mixed)).read()
    sizes = "images have 4 sizes, from 7x5 to 30x20 (height x width); give one, as 64 or [48, 64]"
    assert str(error.value) == f"data.source.size: {sizes}"


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "RGB", "L"])
def test_transparency_lies_over_white(kind: str) -> None:
    """Not what is stored below it: black, or the key colour."""
    below, shown = (0, 0, 0), (90, 90, 90)
    picture = Image.new("RGBA", (2, 1), (*below, 0))
    picture.putpixel((1, 0), (*shown, 255))
    key = {"RGB": below, "L": 0}.get(kind)
    settings = {} if key is None else {"transparency": key}
    if kind == "P":
        picture = picture.convert("RGB").quantize(2)
        settings["transparency"] = picture.getpixel((0, 0))
    file = io.BytesIO()
    picture.convert(kind).save(file, "PNG", **settings)
    assert decode(Image.open(file), "L", [1, 2])[0, :, 0].tolist() == [255, 90]
    assert decode(Image.open(file), "RGB", [1, 2])[0].tolist() == [[255] * 3, [90] * 3]


def test_images_of_more_than_8_bits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The least value of all is black and the greatest white, or those that are given."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    values = np.array([[1000, 1257], [26_700, 66_535]]) - 1000
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "a/0.png")
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "a/1.tif", tiffinfo={274: 3})  # upside down
    Image.fromarray(values.astype(">u2")).save(tmp_path / "b/2.tif")
    Image.fromarray((65_535 - values).astype(np.uint16)).save(tmp_path / "b/3.tif", tiffinfo={262: 0})  # white is 0
    images = ImageTable(str(tmp_path)).read().inputs["pixel_values"]
    wanted = torch.tensor([[0, 1], [100, 255]]) / 255
    assert images.mode == "L"
    assert images.levels == [0, 65_535]
    assert torch.equal(everything(images)[:, 0], torch.stack([wanted, wanted.flip(0, 1), wanted, wanted]))
    said = (
        "data.source: 4 of 4 images have more than 8 bits; 0 is black and 65535 is white; data.source.levels changes it"
    )
    assert said in capfd.readouterr().out.splitlines()
    for kind in (np.float32, np.int32):
        for path in tmp_path.glob("*/*"):
            path.unlink()
        Image.fromarray((values - 1_000_000).astype(kind)).save(tmp_path / "a/0.tif")
        Image.fromarray((values - 1_000_000).astype(kind)).save(tmp_path / "b/1.tif")
        images = ImageTable(str(tmp_path)).read().inputs["pixel_values"]
        assert images.levels == ([-1_000_000, 65_535 - 1_000_000])
        assert torch.equal(everything(images)[:, 0], torch.stack([wanted, wanted]))
        images = ImageTable(str(tmp_path), levels=[-1_000_000.0, -999_743.0]).read().inputs["pixel_values"]
        assert everything(images)[0].flatten().tolist() == [0, 1, 1, 1]
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "a/2.tif")
    with pytest.raises(InputError, match="1 images hold fractions, and 2 whole numbers of more than 8 bits; save"):
        ImageTable(str(tmp_path)).read()


def test_an_earlier_versions_run_on_images_that_it_saw_otherwise_is_refused(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_classes(work / "images")
    main = main_of("classification")
    main(fit(steps=1))
    path = work / "runs/classification/default/checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["facts"].pop("decoding") == {"version": 2, "levels": None}
    torch.save(checkpoint, path)
    main(["test", "--ckpt_path", str(path), "--trainer.limit_test_batches", "1"])
    noise(5, 8, 8, 2).convert("LA").save(work / "images/ape/30.png")
    line = refusal(["test", "--ckpt_path", str(path), "--trainer.limit_test_batches", "1"], capfd)
    assert "1 images are transparent, of more than 8 bits or have a profile, and an earlier version" in line


def test_equal_files_have_equal_keys(tmp_path: Path) -> None:
    """In a folder and as bytes of a table; other bytes of the same size have others."""
    files = [io.BytesIO() for _ in range(3)]
    for number, file in zip((1, 2, 1), files, strict=True):
        noise(number, 4, 4).save(file, "PNG")
    values = [file.getvalue() for file in files]
    pq.write_table(pa.table({"image": values, "label": list("aab")}), tmp_path / "t.parquet")
    for number, value in enumerate(values):
        (tmp_path / f"f/{'aab'[number]}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"f/{'aab'[number]}/{number}.png").write_bytes(value)
    table, folder = (ImageTable(str(tmp_path / name)).read() for name in ("t.parquet", "f"))
    keys = keys_of(table)
    assert torch.equal(keys, keys_of(folder))
    assert keys[0] == keys[2] != keys[1]
    assert fingerprint(table) == fingerprint(folder) != fingerprint(ImageTable(str(tmp_path / "f"), mode="RGB").read())


def test_pairs_are_those_of_the_same_images_in_memory(mixed: Path) -> None:
    images = ImageTable(str(mixed), size=6).read().inputs["pixel_values"]
    ours, theirs = (draw_pairs(each, torch.arange(5), 20, 15, 1, seed=2) for each in (images, everything(images)))
    index = torch.tensor([3, 19, 0])
    assert torch.equal(ours[index], theirs[index])


# A run on images in files.


def write_classes(folder: Path, count: int = 30, size: int = 8) -> Path:
    for kind, name in enumerate(("ape", "bee")):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            noise(100 * kind + number, size, size).save(folder / name / f"{number:02d}.png")
    return folder


def fit(*more: str, name: str = "default", batch: int = 4, steps: int = 8) -> list[str]:
    small = ["--config", str(ROOT / "recipes/classification/small.yaml"), *PLAIN]
    limits = [
        "--trainer.log_every_n_steps",
        "1",
        "--trainer.num_sanity_val_steps",
        "0",
        "--last.every_n_train_steps",
        "1",
    ]
    source = ["--data.source", "common.sources.ImageTable", "--data.source.path", "images"]
    sizes = ["--data.batch_size", str(batch), "--trainer.max_steps", str(steps), "--name", name]
    sizes += ["--model.lr_scheduler", "null"]  # it would know the last step
    return ["fit", *small, *limits, *source, *sizes, "--trainer.enable_progress_bar", "false", *more]


def weights(run: str) -> dict[str, torch.Tensor]:
    path = f"runs/classification/{run}/checkpoints/last.ckpt"
    return torch.load(path, weights_only=True)["state_dict"]


def test_a_run_goes_on_to_the_bit_with_any_number_of_workers(work: Path) -> None:
    write_classes(work / "images")
    main, workers = main_of("classification"), "--data.num_workers"
    main(fit(workers, "0", name="whole", steps=16))  # an epoch and a half
    main(fit(workers, "2", name="parts", steps=5))
    main(["fit", "--name", "parts", "--ckpt_path", "last", workers, "0", "--trainer.max_steps", "12"])
    main(["fit", "--name", "parts", "--ckpt_path", "last", workers, "2", "--trainer.max_steps", "16"])
    for name, value in weights("whole").items():
        assert torch.equal(weights("parts")[name], value), name


def _ranks(folder: Path) -> None:
    os.chdir(folder)
    ddp = str(ROOT / "configs/strategy/ddp.yaml")
    two = ["--config", ddp, "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    main_of("classification")(fit(*two, name="ranks", batch=2))


@pytest.mark.matrix
def test_two_ranks_train_as_one(work: Path) -> None:
    write_classes(work / "images")
    main_of("classification")(fit("--data.num_workers", "0", name="one"))
    assert run_ranks(_ranks, work, folder=work / "logs") == [0, 0], logs(work / "logs")
    one, ranks = (read_metrics(work / f"runs/classification/{n}/metrics.csv", "train/loss") for n in ("one", "ranks"))
    assert ranks == pytest.approx(one, rel=1e-5)
    said = [(work / f"logs/rank{rank}.log").read_text().count("read as L") for rank in (0, 1)]
    assert said == [1, 0]


def refusal(args: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main_of("classification")(args)
    assert stop.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert len(line) <= 240
    return line


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.matrix), "1"])
def test_a_damaged_image_is_one_line(workers: str, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One whose header is whole shows when its batch is read; what was saved before goes on once it is mended."""
    write_classes(work / "images")
    data = main_of("classification")(fit("--data.num_workers", workers, name="good", steps=1)).datamodule
    order = torch.randperm(len(data.train_data), generator=torch.Generator().manual_seed(step_seed(1, 0)))
    sixth = int(data.train_data.positions[order[20]])  # read in the sixth step
    where = data.samples.labelled.inputs["pixel_values"].table[sixth]["image"]["path"]
    content, cut = Path(where).read_bytes(), io.BytesIO()
    Image.open(where).save(cut, "JPEG")
    Path(where).write_bytes(cut.getvalue()[:-30])
    args = fit("--data.num_workers", workers, "--trainer.limit_val_batches", "0", steps=20)
    line = refusal(args, capfd)
    assert f"data.source.image: 'image': {where[-59:]} is no image that can be read (OSError" in line
    assert line.endswith("; mend or remove it")
    Path(where).write_bytes(b"x" + content)
    assert f"{where[-59:]} is no image that can be read (UnidentifiedImage" in refusal(args, capfd)  # at the start
    Path(where).write_bytes(content)
    last = work / "runs/classification/default/checkpoints/last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] in (4, 5)
    assert main_of("classification")(["fit", "--ckpt_path", "last"]).trainer.global_step == 20
    assert (
        "1 samples are new to the checkpoint, 1 for training; 1 of the checkpoint's 60 samples are gone; all"
        in capfd.readouterr().out
    )


def test_what_a_run_knows_of_its_images_holds(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Mode and size for other samples, without a word; a checkpoint that does not know files is refused."""
    write_classes(work / "images")
    main = main_of("classification")
    main(fit(steps=1))
    noise(5, 30, 20, 3).save(work / "images/ape/30.png")
    capfd.readouterr()
    data = main(["test", "--ckpt_path", "last", "--trainer.limit_test_batches", "1"]).datamodule
    assert data.samples.labelled.inputs["pixel_values"].shape == (61, 1, 8, 8)
    other = ["--data.predict_source", "common.sources.ImageTable", "--data.predict_source.path", "images/ape"]
    data = main(["predict", "--ckpt_path", "last", *other, "--data.predict_source.label", "null"]).datamodule
    assert data.predict_data[[0, 30]].inputs["pixel_values"].shape == (2, 1, 8, 8)
    assert "read as" not in capfd.readouterr().out
    path = work / "runs/classification/default/checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["facts"]["by_file"]
    torch.save(checkpoint, path)
    line = refusal(["fit", "--ckpt_path", "last", "--trainer.max_steps", "2"], capfd)
    assert "data.source: the checkpoint knows its images by their pixels, and does not know these files" in line
    main(["predict", "--ckpt_path", "last", *other, "--data.predict_source.label", "null"])


def test_images_need_the_processes_that_they_are_given(mixed: Path) -> None:
    """Decoding is work for the loader's workers; arrays in memory are not."""
    samples = Samples(ImageTable(str(write_classes(mixed / "more"))), 0.2, 0.2, 0, {})
    train, *_ = samples.datasets()
    assert train.decodes
    assert isinstance(samples.labelled.inputs["pixel_values"], Images)
    assert samples.facts["range"] == [0.0, 1.0]


def test_a_later_start_reads_changed_files_alone(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """By size and times; a damaged cache, or none, changes nothing."""
    read: list[str] = []
    monkeypatch.setattr(images_module, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(images_module, "SETTLED", 0)
    content = images_module._content
    monkeypatch.setattr(images_module, "_content", lambda row: (read.append(Path(row["path"]).name), content(row))[1])

    def seen() -> tuple[list[int], Any, str]:
        read.clear()
        images = ImageTable(str(mixed), size=6).read().inputs["pixel_values"]
        return images.keys.tolist(), images.shape, images.mode

    first = seen()
    assert len(read) == 6
    assert (seen(), read) == (first, [])
    path = mixed / "ape/grey.png"
    before, times = path.read_bytes(), path.stat()
    path.write_bytes(before[:-1] + b"x")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    changed = seen()
    assert read == ["grey.png"]
    assert sum(a != b for a, b in zip(changed[0], first[0], strict=True)) == 1
    noise(7, 9, 12).save(mixed / "bee/new.png")
    assert len(seen()[0]) == 7
    assert read == ["new.png"]
    files = [str(file) for file in sorted(mixed.glob("*/*"))]
    for _ in range(2):  # another list of files in the same folder
        read.clear()
        fewer = Images(datasets.Dataset.from_dict({"image": [files[0], files[-1]]}), "image", [6, 6])
        assert (len(fewer), read) == (2, [])
        assert (len(seen()[0]), read) == (7, [])
    whole, (kept,) = seen(), (tmp_path / "cache/images").glob("*")
    for damage in (b"", b"PK", kept.read_bytes()[:-40], kept.read_bytes().replace(b"\1", b"\2")):
        kept.write_bytes(damage)
        assert seen() == whole
        assert len(read) == 7
        assert (seen(), read) == (whole, [])
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder")
    assert seen() == whole
    monkeypatch.setattr(images_module, "CACHE", "~nobody-of-this-name/cache")
    assert seen() == whole
    path.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"grey\.png is no image that can be read"):
        seen()
