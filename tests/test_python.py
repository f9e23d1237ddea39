"""Recipes called from Python: mistakes are raised, and a checkpoint alone predicts what the command predicts."""

import csv
import importlib
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from common.errors import InputError
from tests.support import ROOT, TINY, logs, main_of, run_ranks, write_encoder

FIT = [*TINY, "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
ALL = ["--trainer.limit_predict_batches", "1.0"]  # which the run has limited

pytestmark = pytest.mark.usefixtures("no_report")


def load(recipe: str) -> Any:
    """The module of a run's best checkpoint."""
    module = importlib.import_module(f"recipes.{recipe}.module")
    kind = next(value for name, value in vars(module).items() if name.endswith("Module") and name != "BaseModule")
    return kind.load_from_checkpoint(f"runs/{recipe}/default/checkpoints/best.ckpt")


def same(columns: dict[str, list[Any]], recipe: str) -> None:
    """Compare with what the command has written."""
    with Path(f"runs/{recipe}/default/predict/predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(columns)
    for name, values in columns.items():
        written = [row[name] for row in rows]
        if isinstance(values[0], float):
            np.testing.assert_allclose([float(value) for value in written], values, rtol=1e-6, atol=1e-7)
        else:
            assert written == ["" if value is None else str(value) for value in values]


def refused(model: Any, samples: Any) -> str:
    with pytest.raises(InputError) as error:
        model.predict(samples)
    return str(error.value)


def test_a_mistake_is_raised(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """In flags, in files, and in what is found later; the process and its output stay as they are."""
    main = importlib.import_module("recipes.classification.train").main
    streams = sys.stdout, sys.stderr
    for args, line in (
        (["fit", "--trainer.max_step", "3"], "--trainer.max_step: no such key; did you mean 'trainer.max_steps'?"),
        (["fit", *FIT, "--data.batch_size", "5000"], "--data.batch_size: 5000 x 1 ranks x 1 accumulated = 5000 > "),
        (["fit", *FIT, "--best.monitor", "val/los"], "'val/los' is not logged; did you mean 'val/loss'?"),
    ):
        with pytest.raises(InputError) as error:
            main(args)
        assert line in str(error.value)
        assert "\n" not in str(error.value)
        assert error.value.__suppress_context__
    assert (sys.stdout, sys.stderr) == streams
    assert capfd.readouterr().err == ""
    assert main(["fit", *FIT]).trainer.global_step == 4
    with pytest.raises(InputError, match="--name other: no run of this name has a checkpoint"):
        main(["test", "--name", "other"])


def interrupted(args: list[str]) -> None:
    from recipes.classification import module, train

    step = module.ClassificationModule.training_step

    def stop(self: Any, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, batch_idx)

    module.ClassificationModule.training_step = stop  # type: ignore[method-assign]  # in a forked process
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    with pytest.raises(KeyboardInterrupt):
        train.main(args)


def test_ctrl_c_in_training_ends_no_process(work: Path) -> None:
    assert run_ranks(interrupted, ["fit", *FIT], world=1, folder=work / "log") == [0], logs(work / "log")
    last = torch.load("runs/classification/default/checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 2


def test_images(work: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("ape", "bee"):
        (work / "images" / name).mkdir(parents=True)
        for number in range(20):
            pixels = generator.integers(0, 255, (12, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(work / "images" / name / f"{number:02d}.png")
    source = ["common.sources.ImageTable", "--data.source.path", str(work / "images"), "--data.source.size", "8"]
    args = ["--data.source", *source, "--data.source.mode", "RGB", "--model.net.in_channels", "3"]
    main_of("classification")(["fit", *FIT, *args, "--data.batch_size", "4"])
    given = [word.replace("data.source", "data.predict_source") for word in ["--data.source", *source]]
    more = ["--data.predict_source.mode", "RGB", "--data.predict_source.label", "null"]
    main_of("classification")(["predict", *given, *more, *ALL])
    model = load("classification")
    assert not any(module.training for module in model.modules())
    pictures = [Image.open(path) for path in sorted((work / "images").glob("*/*.png"))]
    found = model.predict(pictures)
    same(found, "classification")
    assert model.predict(np.stack([np.asarray(each) for each in pictures])) == found
    as_the_net = np.stack([np.asarray(each.resize((8, 8)), np.float32).transpose(2, 0, 1) / 255 for each in pictures])
    assert model.predict(as_the_net, batch_size=64) == model.predict(torch.from_numpy(as_the_net)) == found
    assert "values are 0 to 255, and in training 0 to 1" in refused(model, as_the_net * 255)
    assert "each is 3x8x7, and in training 3x8x8 (channels x height x width)" in refused(model, as_the_net[..., :7])
    assert "an array of float32 of the shape (3, 8, 8) is no picture" in refused(model, [*as_the_net])
    one = np.zeros((8, 8, 3), np.uint8)
    assert "an array of the shape (8, 8, 3) is one picture; give a list of them" in refused(model, one)
    for wrong in ("a.png", ["a.png"]):
        assert refused(model, wrong) == ("samples: the net was trained on images; give pictures of Pillow, or an array")
    for nothing in ([], 3):
        assert "there are none to predict" in refused(model, nothing)


def test_texts(work: Path) -> None:
    texts = [f"a {'very ' * (number % 3)}{word} film" for number in range(20) for word in ("good", "bad")]
    pandas.DataFrame({"text": texts, "label": [text.split()[-2] for text in texts]}).to_csv("reviews.csv")
    encoder = str(write_encoder(work / "encoder", texts))
    AutoTokenizer.from_pretrained(encoder, padding_side="left", truncation_side="left").save_pretrained(encoder)
    args = [word for key in ("data.source.tokenizer", "model.net.name") for word in (f"--{key}", encoder)]
    preset = ["--config", str(ROOT / "recipes/classification/text.yaml"), "--data.source.path", "reviews.csv"]
    main_of("classification")(["fit", *preset, *FIT, *args, "--data.source.max_length", "5"])
    new = ["good", "not a bad film, a very very good one", "unheard"]
    pandas.DataFrame({"text": new}).to_csv("new.csv")
    given = ["common.sources.TextTable", "--data.predict_source.path", "new.csv", "--data.predict_source.label", "null"]
    given += ["--data.predict_source.tokenizer", encoder, "--data.predict_source.max_length", "5"]
    main_of("classification")(["predict", "--data.predict_source", *given])
    shutil.rmtree(encoder)  # the checkpoint alone is enough
    model = load("classification")
    main_of("classification")(["export"])
    there = AutoTokenizer.from_pretrained("runs/classification/default/export")
    assert there.padding_side == there.truncation_side == "left"
    same(model.predict(new), "classification")
    for wrong in ("a text", [1, 2], [None]):
        assert refused(model, wrong) == "samples: the net was trained on texts; give a list of them"


def test_a_frame(work: Path) -> None:
    main_of("regression")(["fit", *FIT, "--model.head", "Quantiles", "--model.head.quantiles", "[0.1, 0.5, 0.9]"])
    from sklearn.datasets import load_diabetes

    data: Any = load_diabetes(as_frame=True, scaled=False)
    frame = data.data.head(20).assign(more=1)
    frame.loc[3, "bmi"] = None
    frame.to_csv("new.csv", index=False)
    given = ["common.sources.tables.Table", "--data.predict_source.path", "new.csv"]
    main_of("regression")(["predict", "--data.predict_source", *given, *ALL])
    model = load("regression")
    columns = model.predict(frame)
    assert list(columns) == ["index", "target", "prediction", "lower", "upper"]
    same(columns, "regression")
    assert model.predict(frame.to_dict("records")) == columns
    assert model.predict(frame.assign(progression=7.0))["target"] == pytest.approx([7.0] * 20, rel=1e-5)
    assert refused(model, frame.drop(columns="bmi")) == (
        "samples: lacks the column 'bmi', which the net was trained with"
    )
    assert refused(model, frame.assign(bmi="x")) == "samples: column 'bmi': 'x' in row 0 is no number; mend it"
    assert (
        refused(model, frame.assign(progression="x"))
        == "samples: column 'progression': 'x' in row 0 is no number; mend it"
    )
    assert "no rows of a table" in refused(model, 3)


def test_prompts(work: Path, lm_args: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """Of a file, with columns of it; a text does not hang on the number of ranks, nor on the other prompts."""
    main_of("lm")(["fit", *FIT, *lm_args])
    prompts = ["The import", "a\nb", "class"]
    pandas.DataFrame({"key": ["x", "y", "z"], "prompt": prompts}).to_json("prompts.jsonl", orient="records", lines=True)
    path = ["--data.prompts_path", "prompts.jsonl"]
    main_of("lm")(["predict", *path, "--data.keep", "[key]", *ALL])
    with Path("runs/lm/default/predict/predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "key", "prompt", "text"]
    assert [row["key"] for row in rows] == ["x", "y", "z"]
    assert [row["prompt"] for row in rows] == prompts
    assert all(row["text"].startswith(row["prompt"]) and len(row["text"]) > len(row["prompt"]) for row in rows)
    main_of("lm")(["predict", *path, *ALL])
    L.seed_everything(1)
    model = load("lm")
    same(model.predict(prompts), "lm")
    assert model.predict(prompts[:1])["text"] == [rows[0]["text"]]
    Path("prompts.txt").write_text("The import\nclass\n")
    main_of("lm")(["predict", "--data.prompts_path", "prompts.txt", *ALL])
    same(model.predict(["The import", "class"]), "lm")
    for wrong, line in (
        (["--data.prompts_path", "prompts.txt", "--data.keep", "[key]"], "a text file has no columns"),
        (["--data.prompts_path", "none.txt"], "none.txt: cannot be read (No such file or directory)"),
        (["--data.prompts_path", "prompt.jsonl"], "no such file; did you mean 'prompts.jsonl'?"),
        (
            [*path, "--data.prompts_column", "key", "--data.keep", "[kye]"],
            "no such column among ['key', 'prompt']; did",
        ),
        ([*path, "--data.prompts_column", "text"], "--data.prompts_column: 'text': no such column among"),
        (["--data.keep", "[key]"], "--data.keep: names columns of data.prompts_path; give that, or remove it"),
    ):
        capfd.readouterr()
        with pytest.raises(SystemExit):
            main_of("lm")(["predict", *wrong])
        (said,) = capfd.readouterr().err.splitlines()
        assert line in said
    assert "at least one text is needed" in refused(model, [])
    assert refused(model, ["a", ""]) == "samples: none may be empty, as number 1 is, counted from 0"


def execute(script: Path) -> None:
    exec(compile(script.read_text(), script, "exec"), {})


def test_the_readme_runs(work: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    Path("script.py").write_text("\n".join(blocks))
    assert run_ranks(execute, work / "script.py", world=1, folder=work) == [0], logs(work)
    said = (work / "rank0.log").read_text().splitlines()[-1]
    assert len(re.findall(r"\d+\.\d+", said)) == 3
