"""Classes of tables: an ensemble beside plain references, parts of rows, predictions of raw rows, mistakes."""

import hashlib
import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import accuracy_score, f1_score, log_loss

from common.checkpoint import read_checkpoint
from common.data import total_steps
from common.errors import InputError
from common.nets.tables import TabM
from common.sources.labelled import LabelledBatch
from common.sources.tables import Columns, Table, encode, fit_columns, row_keys
from recipes.classification.module import ClassificationModule
from recipes.classification.objectives import OneLabel, SeveralLabels
from recipes.classification.tables import LabelledTable, TableSamples
from tests.support import ROOT, TINY, halved, logs, main_of, read_metrics, refused, run_ranks

main = main_of("classification")
RUN = Path("runs/classification/default")
PRESET = ["--config", str(ROOT / "recipes/classification/table.yaml"), *TINY, "--trainer.accelerator", "cpu"]
PRESET += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
SMALL = ["--model.net.k", "4", "--model.net.d_block", "16", "--model.net.n_bins", "8", "--model.net.dropout", "0.0"]
TABLE = ["--data.source.path", "birds.csv", "--data.source.label", "species"]
FIT = ["fit", *PRESET, *SMALL, *TABLE]
EVERY = ["--trainer.limit_test_batches", "1.0", "--trainer.limit_predict_batches", "1.0"]
ROWS = 150

pytestmark = pytest.mark.usefixtures("no_report")


def bird_table(rows: int = ROWS) -> Any:
    """Three species that differ in weight and habitat, with gaps."""
    random = np.random.default_rng(0)
    kind = np.arange(rows) % 3
    table = pd.DataFrame({
        "weight": 10.0 + 5 * kind + random.normal(0, 2, rows), "wing": random.uniform(5, 9, rows),
        "habitat": np.where(random.random(rows) < 0.7, np.array(["wood", "sea", "field"])[kind], "town"),
        "ringed": random.random(rows) < 0.5, "species": np.array(["wren", "auk", "lark"])[kind],
    })  # fmt: skip
    table["habitat"] = table["habitat"].astype(object)
    table.loc[::9, "habitat"], table.loc[::7, "weight"] = None, np.nan
    return table


@pytest.fixture
def birds(work: Path) -> Path:
    bird_table().to_csv(work / "birds.csv", index=False)
    return work / "birds.csv"


def predictions() -> Any:
    return pd.read_csv(RUN / "predict/predictions.csv")


# Members


def test_members_are_averaged_as_probabilities() -> None:
    logits = 3 * torch.randn(50, 4, 3, generator=torch.Generator().manual_seed(0)).double()
    found = OneLabel().mean_of_members(logits)
    assert found.exp().numpy() == pytest.approx(logits.softmax(-1).mean(1).numpy(), rel=1e-12)
    assert found.softmax(-1).numpy() == pytest.approx(found.exp().numpy(), rel=1e-12)
    assert (found.softmax(-1) - logits.mean(1).softmax(-1)).abs().max() > 0.05, "which the mean of logits is not"


def test_several_labels_are_averaged_as_probabilities() -> None:
    logits = 3 * torch.randn(50, 4, 3, generator=torch.Generator().manual_seed(0)).double()
    found = SeveralLabels().mean_of_members(logits)
    assert found.sigmoid().numpy() == pytest.approx(logits.sigmoid().mean(1).numpy(), rel=1e-12)


@pytest.mark.parametrize("given", [pytest.param("columns", marks=pytest.mark.matrix), "cells"])
def test_rows_of_several_labels(given: str, birds: Path) -> None:
    """In columns of 0 and 1, or in one cell each; members are averaged as probabilities, rows to predict have none."""
    table = bird_table()
    table["sings"], table["swims"] = (table["species"] == "wren").astype(int), (table["habitat"] == "sea").astype(int)
    pairs = table[["sings", "swims"]].to_numpy()
    table["does"] = [";".join(name for name, has in zip(("sings", "swims"), row, strict=True) if has) for row in pairs]
    table.to_csv(birds, index=False)
    label = {"columns": ["[sings, swims]"], "cells": ["does", "--data.source.separator", ";"]}[given]
    drop = {"columns": "[does]", "cells": "[sings, swims]"}[given]
    args = [*FIT[:-1], *label, "--data.source.drop", drop, "--model.objective", "SeveralLabels"]
    cli = main([*args, "--trainer.max_steps", "150", "--data.batch_size", "32"])
    assert cli.datamodule.class_names == ["sings", "swims"]
    main(["test", *EVERY])
    assert read_metrics(RUN / "test/metrics.csv", "test/f1(swims)")[-1] > 0.9
    rows = table.drop(columns=["sings", "swims", "does"]).head(8)
    rows.to_csv("new.csv", index=False)
    birds.unlink()
    main(["predict", "--data.predict_source", "LabelledTable", "--data.predict_source.path", "new.csv", *EVERY])
    found = predictions()
    assert [*found] == ["index", "prediction", "p(sings)", "p(swims)"]
    module = ClassificationModule.load_from_checkpoint(RUN / "checkpoints/best.ckpt")
    assert module.predict(rows)["p(swims)"] == pytest.approx(found["p(swims)"].tolist(), abs=1e-6)


@pytest.mark.parametrize(("smoothing", "weight"), [(0.0, None), (0.2, torch.tensor([0.5, 2.0]))])
def test_each_member_learns_by_itself(smoothing: float, weight: Any) -> None:
    numbers = {"median": 0.0, "mean": 0.0, "std": 1.0, "quantiles": [-1.0, 0.0, 1.0], "has_missing": False}
    columns: Any = {"targets": ["kind"], "unit": 1.0, "mean": [], "std": [], "scaling": "standard"}
    columns |= {"numeric": {"x": numbers}, "categorical": {}}
    module = ClassificationModule(
        lambda *facts: TabM(*facts, k=5, d_block=8, n_bins=2, dropout=0.0), ["a", "b"], columns=Columns(**columns),
        label_smoothing=smoothing, optimizer=torch.optim.AdamW,
    )  # fmt: skip
    module.configure_model()
    module.class_weight = weight
    inputs = {"numeric": torch.randn(16, 1), "categorical": torch.empty(16, 0, dtype=torch.int64)}
    batch = LabelledBatch(inputs, torch.arange(16) % 2, torch.arange(16), torch.ones(16, dtype=torch.bool))
    loss, items = module.shared_step(batch, "train")
    outputs, target = module.net(**inputs), batch.target
    expected = [
        F.cross_entropy(member, target, weight, label_smoothing=smoothing, reduction="sum") / 16
        for member in outputs.unbind(1)
    ]
    assert len(expected) == 5
    assert items == 16
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-6)


def test_metrics_are_those_of_the_averaged_probabilities(birds: Path) -> None:
    """The loss is the log loss, also where labels are smoothed in training."""
    steps = ["--trainer.max_steps", "20", "--trainer.val_check_interval", "3", "--trainer.limit_val_batches", "1.0"]
    quick = ["--data.batch_size", "32", "--model.optimizer.lr", "0.02"]
    main([*FIT, "--model.label_smoothing", "0.2", *steps, *quick, *EVERY])
    cli = main(["test", "--data.eval_batch_size", "7"])
    main(["predict"])
    found, table = predictions(), bird_table()
    assert found["index"].tolist() == cli.datamodule.samples.parts.test.tolist()
    assert found["target"].tolist() == table["species"][found["index"]].tolist()
    names = ["auk", "lark", "wren"]
    probabilities = found[[f"p({name})" for name in names]].to_numpy()
    probabilities /= probabilities.sum(1, keepdims=True)  # seven digits are written
    assert np.array(names)[probabilities.argmax(1)].tolist() == found["prediction"].tolist()
    module, rows = cli.model, cli.datamodule.test_data[range(30)]
    with torch.no_grad():
        members = module.net.eval()(**rows.inputs)
    assert members.shape[1] == 4
    assert probabilities == pytest.approx(members.softmax(-1).mean(1).numpy(), abs=1e-5)
    expected = {
        "accuracy": accuracy_score(found["target"], found["prediction"]),
        "f1": f1_score(found["target"], found["prediction"], average="macro"),
        "loss": log_loss(found["target"], probabilities, labels=names),
    }
    for name, value in expected.items():
        assert read_metrics(RUN / "test/metrics.csv", f"test/{name}")[-1] == pytest.approx(value, rel=1e-4), name
    assert expected["accuracy"] > 0.5


# Rows and parts


def keys_of_parts(data: Any) -> list[set[int]]:
    table = data.source.table
    keys = row_keys(table.read().drop(columns=["species"]))
    return [set(keys[part].tolist()) for part in data.samples.parts]


def test_a_table_that_grows_moves_no_row(birds: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nor do a new order, a gap or a row that is deleted; equal rows go together, columns stay encoded."""
    every = bird_table(300)
    first = pd.concat([every.iloc[:120], every.iloc[:60]])  # half of them twice
    first.to_csv(birds, index=False)
    before = main(FIT).datamodule
    parts = keys_of_parts(before)
    assert [len(part) for part in parts] == [84, 12, 24]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
    assert sum(map(len, before.samples.parts)) == 180
    every.loc[290, "wing"] = np.nan
    every.iloc[5:].sample(frac=1, random_state=0).to_csv(birds, index=False)
    capfd.readouterr()
    after = main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "6"]).datamodule
    assert "data.source: 180 samples are new to the checkpoint" in capfd.readouterr().out
    gone = set(row_keys(every.iloc[:5].drop(columns=["species"])).tolist())
    assert all(old - gone <= new for old, new in zip(parts, keys_of_parts(after), strict=True))
    assert after.columns == before.columns
    every.iloc[5:].query("species != 'auk'").to_csv(birds, index=False)
    data = main(["test", "--ckpt_path", "last"]).datamodule
    assert data.class_names == ["auk", "lark", "wren"]
    assert set(data.samples.labelled.target.tolist()) == {1, 2}


def test_a_schedule_ends_with_a_run_whose_table_grew(birds: Path) -> None:
    """The planned steps are those that it makes, also where it goes on once more."""
    bird_table().iloc[:60].to_csv(birds, index=False)
    whole = ["--trainer.max_steps", "-1", "--trainer.limit_train_batches", "1.0", "--data.batch_size", "8"]
    whole += ["--data.num_workers", "0", "--model.lr_scheduler", "Cosine"]
    first = main([*FIT, *whole, "--trainer.max_epochs", "2"]).trainer.global_step
    bird_table().to_csv(birds, index=False)
    for epochs in (3, 4):
        trainer = main(["fit", "--ckpt_path", "last", "--trainer.max_epochs", str(epochs)]).trainer
        schedule = trainer.lr_scheduler_configs[0].scheduler
        assert schedule.total_steps == total_steps(trainer) == trainer.global_step
        assert schedule.get_last_lr()[0] == pytest.approx(0, abs=1e-9)
    assert trainer.global_step == first + 2 * trainer.num_training_batches
    assert trainer.num_training_batches > first / 2


def test_equal_rows_of_few_columns_are_no_copies(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Where most rows have an equal one by chance, rows are split one by one, and it is said."""
    random = np.random.default_rng(1)
    table = pd.DataFrame({"deck": random.choice([*"ABCD"], 200), "adult": random.random(200) < 0.8})
    table.assign(lived=random.random(200) < 0.4).to_csv("titanic.csv", index=False)
    samples = TableSamples(LabelledTable("titanic.csv", "lived"), 0.1, 0.2, 0, {})
    assert [len(part) for part in samples.parts] == [140, 20, 40]
    assert samples.facts["class_names"] == ["False", "True"]
    assert "data.source: 40 of 40 test rows equal a training row" in capfd.readouterr().out


def test_rows_are_split_as_the_user_says(work: Path) -> None:
    """By a column of parts, by groups, and in order of time; the net gets none of these columns."""
    table = bird_table(120)
    table["part"] = [*["test", "train", "valid"] * 20, *["train"] * 60]
    table["nest"] = [f"n{number // 6}" for number in range(120)]
    table["day"] = [f"2024-{1 + number % 12:02d}-{1 + number // 12:02d}" for number in range(120)]
    by = {"split": "part", "group": "nest", "time": "day"}

    def samples(column: str, known: Any) -> TableSamples:
        table.to_csv("birds.csv", index=False)
        others = [name for name in by.values() if name != by[column]]
        settings: dict[str, Any] = {"drop": others, column: by[column]}
        return TableSamples(LabelledTable("birds.csv", "species", **settings), 0.1, 0.2, 0, known)

    def parts(column: str) -> list[Any]:
        first = samples(column, {})
        assert by[column] not in {**first.facts["columns"]["numeric"], **first.facts["columns"]["categorical"]}
        assert all(map(torch.equal, samples(column, first.facts).parts, first.parts))
        return [table.iloc[part.numpy()] for part in first.parts]

    assert [set(part["part"]) for part in parts("split")] == [{"train"}, {"valid"}, {"test"}]
    nests = [set(part["nest"]) for part in parts("group")]
    assert [len(names) for names in nests] == [14, 2, 4]
    assert len(set.union(*nests)) == 20
    train, val, test = parts("time")
    assert train["day"].max() < val["day"].min() <= val["day"].max() < test["day"].min()
    assert [len(part) for part in (train, val, test)] == [84, 12, 24]
    facts = samples("split", {}).facts
    table.loc[1, "part"] = "test"
    with pytest.raises(InputError, match="1 samples that the checkpoint knows are in another part now; put them back"):
        samples("split", facts).parts  # noqa: B018
    table["part"] = "test"
    with pytest.raises(InputError, match="names no row for training; name some train"):
        samples("split", {})


def test_data_of_scikit_learn_have_their_classes_names() -> None:
    samples = TableSamples(LabelledTable("sklearn.datasets.load_breast_cancer", "target"), 0.1, 0.2, 0, {})
    data: Any = load_breast_cancer()
    assert samples.facts["class_names"] == ["benign", "malignant"]
    assert torch.equal(samples.labelled.target, 1 - torch.from_numpy(data.target))
    assert samples.labelled.inputs["numeric"].shape == (569, 30)
    shares = [samples.labelled.target[part].float().mean().item() for part in samples.parts]
    assert shares == pytest.approx([212 / 569] * 3, abs=0.02), "as many of each class in every part"
    three = Table("sklearn.datasets.load_linnerud", ["Weight", "Waist", "Pulse"]).read()
    assert three.shape == (20, 6)


# The run


def test_raw_rows_without_the_table_of_training(
    birds: Path, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """With gaps, an unseen habitat and columns of no use, with labels and without; exported as well."""
    main([*FIT, "--trainer.max_steps", "20"])
    rings = ["a", "009001", "1234567890123456", "", "NA", "1234567.891"]
    new = bird_table().iloc[:6].assign(habitat=["wood", "sea", "ice", None, "town", "sea"], ring=rings)
    new[["ringed", "ring", "habitat", "wing", "weight"]].to_csv("new.csv", index=False)
    birds.unlink()
    rows = ["--data.predict_source", "LabelledTable", "--data.predict_source.path", "new.csv", "--data.keep", "[ring]"]
    capfd.readouterr()
    main(["predict", *rows, *EVERY])
    said = "1 of 6 rows hold values that training has in too few rows or in none, such as 'ice'"
    told = [line for line in capfd.readouterr().out.splitlines() if line.startswith("data.predict_source")]
    assert told == [f"data.predict_source: column 'habitat': {said}"]
    text = (RUN / "predict/predictions.csv").read_text()
    first = predictions()
    assert [*first] == ["index", "ring", "prediction", "p(auk)", "p(lark)", "p(wren)"]
    assert [line.split(",")[1] for line in text.splitlines()[1:]] == rings, "as they are written"
    new.assign(species="dodo").to_csv("new.csv", index=False)
    main(["predict", *rows, "--data.predict_source.label", "species", *EVERY])
    assert predictions().equals(first), "labels are not looked at"
    main(["export"])
    facts = json.loads((RUN / "export/facts.json").read_text())
    columns, classes = facts["columns"], facts["class_names"]
    module = ClassificationModule.load_from_checkpoint(RUN / "checkpoints/best.ckpt").eval()
    assert (columns, classes) == (module.columns, ["auk", "lark", "wren"])
    with torch.no_grad():
        found = OneLabel().mean_of_members(module.net(*encode(new, columns))).exp()
    assert found.numpy() == pytest.approx(first[[f"p({name})" for name in classes]].to_numpy(), abs=1e-5)


def digest(name: str) -> str:
    kept = read_checkpoint(RUN.with_name(name) / "checkpoints/last.ckpt")
    sha = hashlib.sha256()
    for values in (kept["state_dict"], *(each for s in kept["optimizer_states"] for each in s["state"].values())):
        for value in values.values():
            sha.update(torch.as_tensor(value).numpy().tobytes())
    return sha.hexdigest()


def test_a_stopped_run_goes_on_to_the_bit(birds: Path) -> None:
    """With dropout, and weights for the classes."""
    more = ["--model.net.dropout", "0.3", "--model.balance_classes", "true", "--trainer.limit_train_batches", "5"]
    more += ["--model.lr_scheduler", "null"]  # which would be another for fewer steps
    main([*FIT, *more, "--trainer.max_steps", "9", "--name", "whole"])
    main([*FIT, *more, "--trainer.max_steps", "3"])
    assert digest("default") != digest("whole")
    main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "9"])
    assert digest("default") == digest("whole")


@pytest.mark.matrix
def test_two_ranks_equal_one(birds: Path, work: Path) -> None:
    layer = ["--config", str(ROOT / "configs/strategy/ddp.yaml"), "--trainer.accelerator", "cpu"]
    for world in (1, 2):
        args = [*FIT, *layer, *EVERY, "--trainer.devices", str(world), "--data.batch_size", str(8 // world)]
        codes = run_ranks(main, [*args, "--name", f"of{world}"], world=world, folder=work)
        assert codes == [0] * world, logs(work)
    one, two = (work / f"runs/classification/of{world}/metrics.csv" for world in (1, 2))
    for name in ("train/loss", "val/loss", "val/f1", "val/auroc"):
        values = read_metrics(one, name)
        assert len(values) >= 2
        assert read_metrics(two, name) == pytest.approx(values, rel=1e-5), name


@pytest.mark.parametrize(
    "net", ["MLP", *(pytest.param(net, marks=pytest.mark.matrix) for net in ("ResNet", "FTTransformer"))]
)
def test_every_net_learns(net: str, birds: Path) -> None:
    flags = ["--model.net", f"common.nets.tables.{net}", "--trainer.max_steps", "60", "--data.batch_size", "32"]
    main(["fit", *PRESET, *TABLE, *flags, "--trainer.limit_val_batches", "1.0", "--trainer.val_check_interval", "3"])
    assert read_metrics(RUN / "metrics.csv", "val/auroc")[-1] > 0.8


# Mistakes


def case(change: dict[str, Any], flags: str, line: str) -> Any:
    return pytest.param(change, flags, line, id=line[:60])


SOURCE = "--data.source"
# fmt: off
MISTAKES = [
    case({}, f"{SOURCE}.label specis", f"{SOURCE}.label: 'specis': no such column among"),
    case({}, f"{SOURCE}.label null", f"{SOURCE}.label: is null, but training needs it; name the column to predict"),
    case({}, f"{SOURCE}.drop [species]", f"{SOURCE}.label: 'species' is also listed in categorical or drop"),
    case({}, f"{SOURCE}.label wing", f"{SOURCE}.label: 'wing': holds numbers, such as "),
    case({}, f"{SOURCE}.path sklearn.datasets.load_win", "no such loader; did you mean 'load_wine'?"),
    case({}, f"{SOURCE}.rare 0", f"{SOURCE}.rare: must be at least 1, got 0"),
    case({}, f"{SOURCE}.split habitat", f"{SOURCE}.split: 'habitat': "),
    case({}, "--model.net.n_bins 500", "--model.net.n_bins: must be from 2 to 104 for so many training rows, got 500"),
    case({}, "--model.net common.nets.ConvNet", "--model.net: may be for images or texts, and data.source is of"),
    case({}, f"{SOURCE} common.sources.Digits", "may be for tables alone, and data.source is of another kind"),
    case({}, f"{SOURCE} common.sources.tables.Table {SOURCE}.path x", "birds.csv holds a table; give --config"),
    case({}, "--model.augmentation '[{class_path: kornia.augmentation.RandomHorizontalFlip}]'",
         "--model.augmentation: is for images, and data.source has none; set it to null"),
    case({}, "--data.predict_source common.sources.Digits", "--data.predict_source: is Digits, and that of the"),
    case({"species": None}, "", f"{SOURCE}.label: 'species': 1 of 150 labels are missing; fill or drop those rows"),
    case({"weight": "heavy"}, "", "column 'weight': 'heavy' in row 149 is no number; mend it, or list"),
]
# fmt: on


@pytest.mark.parametrize(("change", "flags", "line"), halved(MISTAKES))
def test_mistakes(
    change: dict[str, Any], flags: str, line: str, birds: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    table = bird_table().astype(dict.fromkeys(change, object))
    for name, value in change.items():
        table.loc[ROWS - 1, name] = value
    table.to_csv(birds, index=False)
    assert line in refused("classification", [*FIT, "--data.split_seed", "1", *shlex.split(flags)], capfd)


class Buggy(torch.nn.Linear):
    """A net of one's own with a mistake in it."""

    def __init__(self, num_classes: int):
        super().__init__(4, num_classes, bais=False)  # type: ignore[call-arg]


def test_a_bug_in_a_net_of_ones_own_keeps_its_traceback() -> None:
    module = ClassificationModule(Buggy, ["a", "b"], optimizer=torch.optim.AdamW)
    with pytest.raises(TypeError, match="bais"):
        module.build_net()


def test_equal_rows_of_other_classes_stay_where_they_are_as_rows_come(work: Path) -> None:
    """Of two columns of few words most rows are equal; they are split one by one, by their classes too."""
    random = np.random.default_rng(3)
    words, classes = np.array(["x", "y", "z"]), np.array(["p", "q"])
    rows = pd.DataFrame({"a": random.choice(words, 900), "b": random.choice(words, 900)})
    rows = rows.assign(label=random.choice(classes, 900))

    def parts(count: int, known: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        rows.head(count).to_csv("few.csv", index=False)
        samples = TableSamples(LabelledTable("few.csv", "label"), 0.1, 0.2, 0, known)
        rows_of = [sorted(map(tuple, rows.iloc[part].to_numpy().tolist())) for part in samples.parts]
        return [Counter(each) for each in rows_of], samples.facts

    before, facts = parts(300, {})
    for count in (600, 900):
        after, facts = parts(count, facts)
        assert all(not (old - new) for old, new in zip(before, after, strict=True)), "none is missing in its part"
        assert sum(after[0].values()) > sum(before[0].values()), "new rows train too"
        before = after


def test_one_class_and_rare_ones_are_refused(birds: Path, capfd: pytest.CaptureFixture[str]) -> None:
    table = bird_table()
    table.assign(species="auk").to_csv(birds, index=False)
    assert "'auk' is the only class; there is nothing to tell apart" in refused("classification", FIT, capfd)
    table.loc[0, "species"] = "dodo"
    table.to_csv(birds, index=False)
    assert "class 'dodo' has 1 samples; a split needs at least 3" in refused("classification", FIT, capfd)


def test_what_a_checkpoint_does_not_know(birds: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A class, another label, kind of net, or scaling, or columns that are written in another way."""
    main(FIT)
    table = bird_table()
    facts = read_checkpoint(RUN / "checkpoints/best.ckpt")["facts"]

    def problem(changed: Any, **settings: Any) -> str:
        changed.to_csv(birds, index=False)
        with pytest.raises(InputError) as caught:
            TableSamples(LabelledTable("birds.csv", **{"label": "species", **settings}), 0.1, 0.2, 0, facts).parts  # noqa: B018
        return str(caught.value)

    assert "not trained on a class 'awk'; did you mean 'auk'?" in problem(table.replace("auk", "awk"))
    numbers = problem(table.assign(ringed=table["ringed"].astype(int)))
    assert "column 'ringed' holds numbers, such as '1', and in training true and false, such as 'False'" in numbers
    assert "lacks the column 'wing', which the net was trained with; did you" in problem(
        table.rename(columns={"wing": "wng"})
    )
    line = problem(table.assign(age=3))
    assert "the checkpoint was not trained with the column 'age'; list it in data.source.drop" in line
    line = problem(table.assign(kind=table["species"]), label="kind", drop=["species"])
    assert line == "data.source.label: is kind, and that of the checkpoint species; take that"
    assert "data were made with quantile, and their parts and encoding hold" in problem(table, scaling="standard")
    samples = ["--data.facts_of", str(RUN / "checkpoints/best.ckpt")]
    for recipe, kind in (("regression", "numbers of a table"), ("classification", "such samples")):
        line = refused(recipe, ["fit", *TINY, *samples], capfd)
        assert line == f"--data.facts_of: the checkpoint was not trained on {kind}; name another, or null"
    source = ["--data.source", "recipes.classification.tables.LabelledTable", "--data.source.path", "birds.csv"]
    line = refused("adversarial", ["fit", *TINY, *source], capfd)
    assert "is a table, which is encoded by its training rows; classification alone takes it" in line


CODES = ["007", "012", "100"]


@pytest.mark.parametrize(
    ("trained", "given", "line"),
    [
        (CODES, CODES, ""),
        ([7, 12, 100], CODES, ""),
        ([7, 12, 100], ["7", "12", "100"], ""),
        ([7, 12, 100], ["7.0", "12.0", "100.0"], ""),
        ([7, 12, 100], [7.0, 12.0, 100.0], ""),
        ([7, 12, 100], [7.0, "012", 100], ""),
        ([7.0, 12.0, 100.0], CODES, ""),
        (["7", "12", "100"], [7, 12, 100], ""),
        (["7", "x", "100"], ["007", "x", 100.0], ""),
        (CODES, [7, 12, 100], "holds the number 12, where training had the text '012'; give it as text"),
        (CODES, [7.0, 12.0, 100.0], "holds the number 12, where training had the text '012'; give it as text"),
        (CODES, ["7", "12", "100"], "holds the text 12, where training had the text '012'; give it as text"),
        (CODES, [7, "x", 100], "holds the text 7, where training had the text '007'; give it as text"),
    ],
)
def test_codes_are_the_same_as_text_and_as_numbers(trained: list[Any], given: list[Any], line: str) -> None:
    """Or are refused, where zeros are lost."""
    source = Table("codes.csv", "y", categorical=["code"])
    frame = pd.DataFrame({"code": pd.Series(trained * 10), "y": range(30)})
    columns = fit_columns(frame, np.arange(30.0)[:, None], source, "standard", 5)
    new = pd.DataFrame({"code": pd.Series(given)})
    if line:
        with pytest.raises(InputError, match=re.escape(line)):
            encode(new, columns)
    else:
        assert torch.equal(encode(new, columns)[1], encode(frame.head(3), columns)[1])


def test_text_that_is_another_code_stays_unseen() -> None:
    """Where training, or the column, has both of them as text."""
    source = Table("codes.csv", "y", categorical=["code"])
    frame = pd.DataFrame({"code": ["007", "7"] * 10, "y": range(20)})
    columns = fit_columns(frame, np.arange(20.0)[:, None], source, "standard", 5)
    assert encode(pd.DataFrame({"code": ["007", "7", "07"]}), columns)[1][:, 0].tolist() == [2, 3, 0]
    frame.loc[0:17:2, "code"] = "7"
    columns = fit_columns(frame, np.arange(20.0)[:, None], source, "standard", 5)
    assert encode(frame, columns)[1][-2:, 0].tolist() == [0, 2], "a rare one"


def test_changed_labels_of_a_table_are_said(birds: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Rows stay in their parts, by class and in order of time."""
    table = bird_table().assign(day=range(ROWS))
    settings: list[dict[str, Any]] = [{}, {"time": "day"}, {"group": "day"}]
    for more in settings:
        table.to_csv(birds, index=False)
        before = TableSamples(LabelledTable("birds.csv", "species", **more), 0.1, 0.2, 0, {})
        before.labelled  # noqa: B018
        changed = table.copy()
        changed.loc[5, "species"] = "auk" if table["species"][5] != "auk" else "wren"
        changed.to_csv(birds, index=False)
        after = TableSamples(LabelledTable("birds.csv", "species", **more), 0.1, 0.2, 0, before.facts)
        assert [part.tolist() for part in after.parts] == [part.tolist() for part in before.parts]
        now, then = changed["species"][5], table["species"][5]
        out = capfd.readouterr().out
        such = f"such as sample 5 ({now!r} now{'' if 'time' in more else f', {then!r} before'});"
        assert f"1 samples have another label than the checkpoint knows, {such}" in out
        assert "new to the checkpoint" not in out
        again = TableSamples(LabelledTable("birds.csv", "species", **more), 0.1, 0.2, 0, after.facts)
        assert again.labelled.target.tolist() == after.labelled.target.tolist()
        assert "another label" not in capfd.readouterr().out


def test_true_and_false_are_not_0_and_1(birds: Path, capfd: pytest.CaptureFixture[str]) -> None:
    table = bird_table()
    table.assign(species=table["species"] == "auk").to_csv(birds, index=False)
    assert main(FIT).datamodule.class_names == ["False", "True"]
    table.assign(species=(table["species"] == "auk").astype(int)).to_csv(birds, index=False)
    assert "the checkpoint was not trained on a class '0'; it knows False, True" in refused(
        "classification", ["test"], capfd
    )
