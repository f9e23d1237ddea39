"""The regression recipe: encoding, heads and nets beside plain references, predictions from raw rows, mistakes."""

import csv
import json
import logging
import math
import re
import shlex
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import LinearRegression
from sklearn.metrics import mean_absolute_error, mean_pinball_loss, mean_squared_error, r2_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import QuantileTransformer, StandardScaler
from torch import Tensor

from common.checkpoint import read_checkpoint
from common.errors import InputError
from common.nets.tables import MLP, FTTransformer, ResNet, TabM
from common.run.cli import RecipeCLI
from common.sources.labelled import Parts, parts_facts, same_parts
from common.sources.tables import (
    Columns,
    Diabetes,
    Scaling,
    Table,
    cardinalities,
    encode,
    fit_columns,
    read_targets,
    row_keys,
    scaled_quantiles,
    split_rows,
)
from recipes.regression.data import Batch, RegressionData
from recipes.regression.heads import Gaussian, Head, Mean, Quantiles, scores
from recipes.regression.module import RegressionModule
from tests.support import ROOT, TINY, halved, logs, main_of, read_metrics, run_ranks

pytestmark = pytest.mark.usefixtures("no_report")

main = main_of("regression")
TABLES = "common.sources.tables"
SMALL = ["--config", str(ROOT / "recipes/regression/small.yaml"), *TINY, "--trainer.accelerator", "cpu"]
ROWS = 200


def house_table(rows: int = ROWS) -> Any:
    """Rents that follow from size, floor and district, with gaps in each column."""
    random = np.random.default_rng(0)
    size, floor, district = random.uniform(20, 150, rows), random.integers(0, 6, rows), random.choice([*"abc"], rows)
    rent = 8.0 * size + 20 * floor + 300 * (district == "a") + random.normal(0, 30, rows)
    table = pd.DataFrame({"size": size, "floor": floor, "district": district, "lift": floor > 2, "rent": rent})
    table["district"] = table["district"].astype(object)
    table.loc[::9, "district"] = None
    table.loc[::7, "size"] = np.nan
    return table


@pytest.fixture
def houses(work: Path) -> Path:
    house_table().to_csv(work / "houses.csv", index=False)
    return work / "houses.csv"


TABLE = [
    "--data.source",
    "common.sources.tables.Table",
    "--data.source.path",
    "houses.csv",
    "--data.source.target",
    "rent",
]


def fitted(table: Any, scaling: Scaling = "quantile", rare: int = 5, **settings: Any) -> Columns:
    source = Table("", target="rent", **settings)
    return fit_columns(table, read_targets(table, source), source, scaling, rare)


# Encoding


@pytest.mark.parametrize("scaling", ["quantile", "standard"])
def test_numbers_are_scaled_as_scikit_learn_does(scaling: Scaling) -> None:
    table = house_table()
    table.loc[::5, "floor"] = np.nan
    columns, train = fitted(table, scaling), table.iloc[:150]
    columns = fitted(train, scaling)
    numeric, _ = encode(table, columns)
    for place, name in enumerate(columns["numeric"]):
        known = train[[name]].dropna().to_numpy()
        reference: Any = StandardScaler() if scaling == "standard" else None
        reference = reference or QuantileTransformer(n_quantiles=len(known), output_distribution="normal")
        filled = table[[name]].fillna(train[name].median()).to_numpy()
        expected = reference.fit(known).transform(filled)[:, 0]
        assert numeric[:, place].numpy() == pytest.approx(expected, abs=1e-5)


def test_gaps_rare_and_unseen_categories_have_classes_of_their_own() -> None:
    table = house_table()
    table.loc[[1, 2, 3], "district"] = "rare"
    columns = fitted(table)
    assert columns["categorical"] == {"district": ["a", "b", "c"], "lift": ["False", "True"]}
    assert cardinalities(columns) == [5, 4, 2], "and whether the size is missing"
    new = table.iloc[:5].assign(district=["a", "c", "rare", "unseen", None], size=[1.0, np.nan, 2, 3, 4])
    numeric, categorical = encode(new, columns)
    assert categorical[:, 0].tolist() == [2, 4, 0, 0, 1]
    assert categorical[:, 2].tolist() == [0, 1, 0, 0, 0]
    assert numeric.isfinite().all()


def test_numbers_that_are_categories_do_not_depend_on_gaps() -> None:
    """Readers make floats of whole numbers where one is missing, and numbers of text where no other text is left."""
    columns = fitted(house_table(), categorical=["floor"])
    assert columns["categorical"]["floor"] == [*"012345"]
    new = house_table().iloc[:3]
    codes = [
        encode(new.assign(floor=floors), columns)[1][:2, 1].tolist()
        for floors in ([1, 3, 0], [1.0, 3.0, np.nan], ["1", "3", "attic"])
    ]
    assert codes[0] == codes[1] == codes[2]


def test_numbers_that_have_lost_their_zeros_are_refused() -> None:
    """As readers of CSV files make them of a column in which no other text is left."""
    codes = [["01234", "10115", "b"][row % 3] for row in range(ROWS)]
    columns = fitted(house_table().assign(district=codes), categorical=["district"])
    new = house_table().iloc[:2]
    assert encode(new.assign(district=["01234", "10115"]), columns)[1][:, 0].tolist() == [2, 3]
    assert encode(new.assign(district=[10115, 99]), columns)[1][:, 0].tolist() == [3, 0], "nothing is lost"
    assert encode(new.assign(district=[np.nan, np.nan]), columns)[1][:, 0].tolist() == [1, 1]
    with pytest.raises(InputError, match="'district' holds the number 1234, where training had the text '01234'; give"):
        encode(new.assign(district=[1234, 10115]), columns)


def test_statistics_come_from_the_training_rows_alone(houses: Path) -> None:
    data = main(["preflight", *SMALL, *TABLE]).datamodule
    other: Any = pd.read_csv(houses)
    outside = np.setdiff1d(np.arange(ROWS), data.table.parts.train.numpy())
    other.loc[outside, ["size", "floor", "rent"]] *= 1000
    other.loc[outside, "district"] = "elsewhere"
    other.to_csv(houses, index=False)
    assert main(["preflight", *SMALL, *TABLE]).datamodule.columns == data.columns


def test_test_rows_are_those_of_scikit_learn() -> None:
    for seed in (0, 1):
        parts, _ = split_rows(pd.DataFrame({"x": range(1000)}), Diabetes(), 0.1, 0.2, seed)
        rest, test = map(list, train_test_split(np.arange(1000), test_size=0.2, random_state=seed))
        assert parts.test.tolist() == test
        assert sorted([*parts.train.tolist(), *parts.val.tolist()]) == sorted(rest)
        assert len(parts.val) == 100


def test_quantiles_for_bins_are_those_of_the_scaled_rows() -> None:
    table = house_table()
    columns = fitted(table, "standard")
    numeric, _ = encode(table.dropna(subset=["size"]), columns)
    expected = np.quantile(numeric[:, 0].numpy(), np.linspace(0, 1, 11))
    found = np.quantile(scaled_quantiles(columns)[:, 0].numpy(), np.linspace(0, 1, 11))
    assert found == pytest.approx(expected, abs=1e-2)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pd.date_range("2020-01-01", periods=ROWS).where(np.arange(ROWS) % 9 > 0), "Timestamp"),
        (pd.Series(pd.to_timedelta(np.arange(ROWS), unit="h")), "Timedelta"),
        (pd.Series([[1, 2]] * ROWS), "list"),
        (pd.Series([{"a": 1}, {"a": 2}] * (ROWS // 2)), "dict"),
    ],
)
def test_other_kinds_than_numbers_and_text_are_refused(values: Any, kind: str) -> None:
    table = house_table().assign(built=values)
    with pytest.raises(InputError, match=f"column 'built' holds {kind}, .* list it in data.source.drop"):
        fitted(table)
    with pytest.raises(InputError, match=r"column '\{built\}' holds"):
        fitted(table.rename(columns={"built": "{built}"}))
    with pytest.raises(InputError, match=f"^data.source.target 'built' holds {kind}, where numbers are needed"):
        read_targets(table, Table("", target="built"))


def test_decimals_are_numbers_and_flags_with_gaps_are_categories() -> None:
    prices = [Decimal(n) / 4 for n in range(ROWS)]
    columns = fitted(house_table().assign(price=prices, pets=[True, False, None, True] * (ROWS // 4)))
    assert columns["numeric"]["price"]["median"] == np.median([float(price) for price in prices])
    assert columns["categorical"]["pets"] == ["False", "True"]


# Heads


@pytest.fixture
def outputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(500, 4, 3, generator=generator), torch.randn(500, generator=generator)


def test_losses_equal_their_formulas(outputs: tuple[Tensor, Tensor]) -> None:
    values, target = outputs
    members = [member.numpy() for member in values.unbind(1)]
    squared = [mean_squared_error(target, member[:, 0]) for member in members]
    assert Mean().loss(values[..., :1], target).item() == pytest.approx(np.mean(squared), rel=1e-5)
    normal = torch.distributions.Normal(values[..., 0], (values[..., 1] / 2).exp())
    expected = -normal.log_prob(target[:, None]).mean().item()
    assert Gaussian().loss(values[..., :2], target).item() == pytest.approx(expected, rel=1e-5)
    taus = (0.1, 0.5, 0.8)
    pinball = [mean_pinball_loss(target, m[:, n], alpha=tau) for m in members for n, tau in enumerate(taus)]
    assert Quantiles(taus).loss(values, target).item() == pytest.approx(np.mean(pinball), rel=1e-5)


def test_an_ensemble_predicts_its_mixture(outputs: tuple[Tensor, Tensor]) -> None:
    values, _ = outputs
    assert Mean().predict(values[..., :1])[:, 0] == pytest.approx(values[..., 0].mean(1))
    mean, lower, upper = Gaussian(0.8).predict(values[:3, :, :2]).T
    component = torch.distributions.Normal(values[:3, :, 0], (values[:3, :, 1] / 2).exp())
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(3, 4)), component)
    assert mean == pytest.approx(mixture.mean)
    assert (upper - lower) == pytest.approx(2 * 1.2815516 * mixture.stddev, rel=1e-5)
    median, lower, upper = Quantiles((0.1, 0.5, 0.8)).predict(values).T
    assert ((lower <= median) & (median <= upper)).all(), "though the outputs cross"
    assert median == pytest.approx(values.mean(1).median(-1).values)


@pytest.mark.parametrize("head", [Gaussian(0.7), Quantiles((0.15, 0.5, 0.85))])  # 70 % of the targets
def test_intervals_cover_what_they_say(head: Head) -> None:
    """Trained on nothing but noise of two widths, an interval has to be calibrated."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randint(0, 2, (4000, 1), generator=generator).float()
    target = (torch.randn(4000, generator=generator) * (1 + 2 * wide[:, 0])).float()
    net = torch.nn.Linear(1, head.num_outputs)
    torch.nn.init.zeros_(net.weight)
    torch.nn.init.zeros_(net.bias)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        head.loss(net(wide)[:, None], target).backward()
        optimizer.step()
    with torch.no_grad():
        preds, lower, upper = head.predict(net(wide)[:, None]).T
    for group in (0, 1):
        rows = wide[:, 0] == group
        found = scores(target[rows], preds[rows], lower[rows], upper[rows])
        assert found["coverage"].item() == pytest.approx(0.7, abs=0.03)


def test_scores_equal_scikit_learn(outputs: tuple[Tensor, Tensor]) -> None:
    preds, target = outputs[0][:, 0, 0].double(), outputs[1].double()
    found = {name: value.item() for name, value in scores(target, preds, preds - 1, preds + 1).items()}
    expected = {
        "mse": mean_squared_error(target, preds), "rmse": math.sqrt(mean_squared_error(target, preds)),
        "mae": mean_absolute_error(target, preds), "r2": r2_score(target, preds),
        "coverage": float(((target - preds).abs() <= 1).double().mean()), "interval_width": 2.0,
    }  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-9)


# Nets


@pytest.mark.parametrize("kind", [MLP, ResNet, FTTransformer, TabM])
@pytest.mark.parametrize("present", ["both", "numeric", "categorical"])
def test_nets_take_either_kind_of_column(kind: Any, present: str) -> None:
    sizes = [] if present == "numeric" else [3, 4]
    width = 0 if present == "categorical" else 2
    quantiles = torch.linspace(-2, 2, 50)[:, None].expand(-1, width)
    net = kind(2, sizes, quantiles)
    numeric = torch.randn(8, width, requires_grad=width > 0)
    outputs = net(numeric, torch.randint(0, 3, (8, len(sizes))))
    assert outputs.shape == (8, 32 if kind is TabM else 1, 2)
    outputs.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters()), "no parameter is idle"


def test_bins_of_tabm_are_quantiles() -> None:
    quantiles = torch.linspace(0, 1, 101)[:, None] ** 2
    net = TabM(1, [], quantiles, n_bins=4)
    encoding: Any = net.net.num_module.impl  # type: ignore[union-attr]
    edges = -encoding.bias / encoding.weight  # where each component is 0: the left edge of its bin
    assert edges[0].tolist() == pytest.approx([0, 0.0625, 0.25, 0.5625], abs=1e-5)


def test_initial_weights_leave_factors_and_biases_of_members_alone() -> None:
    def module(**settings: Any) -> Any:
        return RegressionModule(TabM, Mean(), fitted(house_table()), optimizer=torch.optim.AdamW, **settings)

    plain, own = module(), module(weight_init="kaiming_normal")
    plain.configure_model()
    own.configure_model()
    for (name, p), before in zip(own.net.named_parameters(), plain.net.parameters(), strict=True):
        assert torch.equal(p, before) != name.endswith("weight"), name


# The recipe


def test_metrics_are_in_the_targets_units_and_beside_baselines(houses: Path, work: Path) -> None:
    every = ["--trainer.limit_test_batches", "1.0", "--data.eval_batch_size", "7"]
    main(["fit", *SMALL, *TABLE, *every])
    cli = main(["test", "--ckpt_path", "last", *every])
    run = work / "runs/regression/default"
    main(["predict", "--ckpt_path", "last", "--trainer.limit_predict_batches", "1.0"])
    predictions: Any = pd.read_csv(run / "predict-last/predictions.csv")
    table: Any = pd.read_csv(houses)
    test = list(train_test_split(np.arange(ROWS), test_size=0.2, random_state=0)[1])
    assert predictions["index"].tolist() == test
    target = table["rent"].iloc[test].to_numpy()
    assert predictions["target"].to_numpy() == pytest.approx(target, rel=1e-6)
    rmse = math.sqrt(mean_squared_error(target, predictions["prediction"]))
    assert read_metrics(run / "test-last/metrics.csv", "test/rmse")[-1] == pytest.approx(rmse, rel=1e-5)
    assert read_metrics(run / "test-last/metrics.csv", "test/r2")[-1] == pytest.approx(
        r2_score(target, predictions["prediction"]), rel=1e-4, abs=1e-6
    )
    lines = (run / "texts/test-baselines.txt").read_text().splitlines()
    found = {line[:20].strip(): float(line[20:]) for line in lines[1:]}
    assert found["this net"] == pytest.approx(rmse, rel=1e-3)
    rest = np.setdiff1d(np.arange(ROWS), test)
    kept = table.drop(columns="rent").astype({"district": "category", "lift": "category"})
    trees = HistGradientBoostingRegressor(random_state=0).fit(kept.iloc[rest], table["rent"].iloc[rest])
    expected = math.sqrt(mean_squared_error(target, trees.predict(kept.iloc[test])))
    assert found["gradient boosting"] == pytest.approx(expected, rel=2e-2), "but for categories in another order"
    medians = table.iloc[cli.datamodule.table.parts.train.numpy()]["size"].median()
    plain = table.drop(columns="rent").assign(gap=table["size"].isna(), size=table["size"].fillna(medians))
    one_hot = pd.get_dummies(plain.fillna({"district": "missing"}), columns=["district"]).astype(float)
    linear = LinearRegression().fit(one_hot.iloc[rest], table["rent"].iloc[rest])
    expected = math.sqrt(mean_squared_error(target, linear.predict(one_hot.iloc[test])))
    assert found["linear regression"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.matrix
def test_ranks_compare_with_baselines_what_they_log(houses: Path, work: Path) -> None:
    main(["fit", *SMALL, *TABLE])
    layer = ["--config", str(ROOT / "configs/strategy/ddp.yaml"), "--trainer.accelerator", "cpu"]
    args = ["test", *layer, "--trainer.limit_test_batches", "1.0", "--data.eval_batch_size", "7"]
    assert run_ranks(main, [*args, "--trainer.devices", "2"], folder=work) == [0, 0], logs(work)
    run = work / "runs/regression/default"
    (rmse,) = re.findall(r"this net +(\S+)", (run / "texts/test-baselines.txt").read_text())
    assert read_metrics(run / "test/metrics.csv", "test/rmse")[-1] == pytest.approx(float(rmse), rel=1e-3)


def test_targets_are_exact_whatever_the_precision(houses: Path, work: Path) -> None:
    """True bf16 rounds what is in a batch, on which neither metrics nor the table of predictions may depend."""
    every = ["--trainer.limit_test_batches", "1.0", "--trainer.limit_predict_batches", "1.0"]
    run = work / "runs/regression/default"
    main(["fit", *SMALL, *TABLE, *every, "--trainer.precision", "bf16-true"])
    main(["test"])
    rows = ["--data.predict_source", "common.sources.tables.Table", "--data.predict_source.path", "houses.csv"]
    for extra in ([], rows):
        main(["predict", *extra])
        found: Any = pd.read_csv(run / "predict/predictions.csv")
        target: Any = pd.read_csv(houses)["rent"][found["index"]]
        assert found["target"].to_numpy() == pytest.approx(target.to_numpy(), rel=1e-6)
        if not extra:
            rmse = math.sqrt(mean_squared_error(target, found["prediction"]))
            assert read_metrics(run / "test/metrics.csv", "test/rmse")[-1] == pytest.approx(rmse, rel=1e-5)


def test_baselines_can_be_left_out(work: Path) -> None:
    main(["fit", *SMALL, "--model.baselines", "false"])
    main(["test"])
    assert not (work / "runs/regression/default/texts/test-baselines.txt").exists()


def test_predicts_raw_rows_with_gaps_and_new_categories(
    houses: Path, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """With the target and without; the table of training may be gone."""
    head = ["--model.head", "Quantiles"]
    main(["fit", *SMALL, *TABLE, *head])
    new: Any = pd.read_csv(houses).iloc[:6].assign(district=["a", "b", "new", None, "c", "a"])
    new["extra"] = "of no use"
    new[["lift", "extra", "district", "floor", "size"]].to_csv("new.csv", index=False)
    rows = ["--data.predict_source", "common.sources.tables.Table", "--data.predict_source.path", "new.csv"]
    every = ["--trainer.limit_predict_batches", "1.0"]
    table = work / "runs/regression/default/predict/predictions.csv"
    capfd.readouterr()
    main(["predict", *rows, *every])
    said = "1 of 6 rows hold values that training has in too few rows or in none, such as 'new'"
    told = [line for line in capfd.readouterr().out.splitlines() if line.startswith("data.predict_source")]
    assert told == [f"data.predict_source: column 'district': {said}"]
    first = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["index"] for row in first] == [*"012345"]
    assert {row["target"] for row in first} == {""}
    assert all(float(row["lower"]) <= float(row["prediction"]) <= float(row["upper"]) for row in first)
    assert len({row["prediction"] for row in first}) > 3
    houses.unlink()
    checkpoint = work / "runs/regression/default/checkpoints/best.ckpt"
    new.loc[2, "rent"] = np.nan
    new.to_csv("new.csv", index=False)
    main(["predict", *rows, *every, "--data.keep", "[extra, district]"])
    second = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["prediction"] for row in second] == [row["prediction"] for row in first]
    assert [row["district"] for row in second] == ["a", "b", "new", "", "c", "a"]
    assert list(second[0])[:3] == ["index", "extra", "district"]
    assert [row["target"] for row in second] == [f"{rent:.7g}" if rent == rent else "" for rent in new["rent"]]
    module = RegressionModule.load_from_checkpoint(checkpoint).eval()
    with torch.no_grad():
        median = module.predictions(module.net(*encode(new, module.columns)))[:, 0, 0]
    assert median.tolist() == pytest.approx([float(row["prediction"]) for row in first], rel=1e-5)


def test_another_table_does_not_pass_for_the_one_it_was_trained_on(
    houses: Path, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    main(["fit", *SMALL, *TABLE])
    table: Any = pd.read_csv(houses)
    table.assign(size=2 * table["size"]).to_csv(houses, index=False)
    line = refused(["test"], capfd)
    assert f"of the checkpoint's {ROWS} samples are gone" in line
    assert "they are others, or have changed; give those of the training" in line


def test_a_table_that_grows_moves_no_row(houses: Path, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nor does a gap that is new, or the order. Columns stay encoded as in training."""
    every = pd.read_csv(houses)
    every.iloc[: ROWS // 2].to_csv(houses, index=False)
    first = main(["fit", *SMALL, *TABLE]).datamodule

    def parts(data: Any) -> list[set[int]]:
        table = data.table
        return [set(row_keys(table.frame.iloc[part.numpy()]).tolist()) for part in table.parts]

    before = parts(first)
    every.loc[ROWS - 1, "floor"] = np.nan
    every.sample(frac=1, random_state=0).to_csv(houses, index=False)
    capfd.readouterr()
    after = main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "20"]).datamodule
    assert f"data.source: {ROWS // 2} samples are new to the checkpoint" in capfd.readouterr().out
    assert all(old <= new for old, new in zip(before, parts(after), strict=True))
    assert after.columns == first.columns
    assert parts(main(["test", "--ckpt_path", "last"]).datamodule) == parts(after)
    every.assign(age=3).to_csv(houses, index=False)
    problem = "path: the checkpoint was not trained with the column 'age'; list it in data.source.drop"
    line = refused(["test"], capfd)
    assert line.startswith("runs/regression/default/config.yaml:")
    assert line.endswith(problem)


def test_rows_are_split_as_the_user_says(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By a column of parts, by groups, and in order of time; the net gets none of these columns."""
    table = house_table(120)
    table["part"] = ["Train"] * 60 + ["valid"] * 20 + ["test"] * 40
    table["street"] = [f"s{number // 6}" for number in range(120)]
    table["day"] = [f"2024-{1 + number % 12:02d}-{1 + number // 12:02d}" for number in range(120)]
    table.to_csv("rows.csv", index=False)

    table_flags = [*SMALL, "--data.source", f"{TABLES}.Table", "--data.source.path", "rows.csv"]
    table_flags += ["--data.source.target", "rent"]

    def parts(column: str, *args: str) -> list[Any]:
        others = sorted({"part", "street", "day"} - {by[column]})
        flags = [
            *SMALL,
            "--data.source",
            f"{TABLES}.Table",
            "--data.source.path",
            "rows.csv",
            "--data.source.target",
            "rent",
        ]
        flags += [f"--data.source.{column}", by[column], "--data.source.drop", json.dumps(others), *args]
        data = main(["fit", *flags]).datamodule
        assert by[column] not in {**data.columns["numeric"], **data.columns["categorical"]}
        return [data.table.frame.iloc[part.numpy()] for part in data.table.parts]

    by = {"split": "part", "group": "street", "time": "day"}
    assert [set(part["part"]) for part in parts("split")] == [{"Train"}, {"valid"}, {"test"}]
    streets = [set(part["street"]) for part in parts("group")]
    assert [len(names) for names in streets] == [14, 2, 4]
    assert len(streets[0] | streets[1] | streets[2]) == 20  # none in two
    train, val, test = parts("time")
    assert train["day"].max() < val["day"].min() <= val["day"].max() < test["day"].min()
    assert [len(part) for part in (train, val, test)] == [84, 12, 24]

    parts("split")
    table.loc[0, "part"] = "test"
    table.to_csv("rows.csv", index=False)
    line = "data.source: 1 samples that the checkpoint knows are in another part now; put them back"
    assert line in refused(["test", "--ckpt_path", "last"], capfd)
    line = refused(["fit", *table_flags, "--data.source.time", "part"], capfd)
    assert line.startswith("--data.source.time: 'part': 'test' is neither a number nor a date")


@pytest.mark.parametrize(
    "by", [{}, *(pytest.param({key: "day"}, marks=pytest.mark.matrix) for key in ("time", "group"))]
)
def test_changed_targets_are_said(by: dict[str, Any], work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Rows stay in their parts: a row that has trained is not tested with its new target."""
    rows = pd.DataFrame({"size": np.arange(100) % 31, "day": range(100), "rent": np.arange(100) * 1.5})
    rows.to_csv("rows.csv", index=False)
    before = RegressionData(Table("rows.csv", "rent", **by))
    rows.loc[[3, 50], "rent"] = 7.25
    rows.to_csv("rows.csv", index=False)
    torch.save({"state_dict": {}, "global_step": 0, "facts": before.facts}, "before.ckpt")
    after = RegressionData(Table("rows.csv", "rent", **by), facts_of="before.ckpt")
    assert [part.tolist() for part in after.table.parts] == [part.tolist() for part in before.table.parts]
    out = capfd.readouterr().out
    assert "2 rows have another target than the checkpoint knows, such as row 3 ('rent' is 7.25 now); the pres" in out
    assert "new to the checkpoint" not in out


def test_a_run_of_before_is_refused_as_such(houses: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its facts name one target, and none in a list."""
    main(["fit", *SMALL, *TABLE])
    for path in Path("runs/regression/default/checkpoints").glob("*.ckpt"):
        state = torch.load(path, weights_only=True)
        state["facts"]["columns"]["target"] = state["facts"]["columns"].pop("targets")[0]
        torch.save(state, path)
    for command in (["test"], ["fit", "--ckpt_path", "last", "--trainer.max_steps", "9"]):
        assert refused(command, capfd).endswith("data.source: the checkpoint is of an earlier version; begin a new run")


def test_equal_rows_stay_in_their_parts() -> None:
    """Each part keeps as many as before. More are drawn."""
    keys = torch.tensor([7, 7, 7, 1, 2, 3])
    known = parts_facts({"keys": keys}, Parts(torch.tensor([0, 3]), torch.tensor([1, 4]), torch.tensor([2, 5])))
    more = torch.tensor([3, 7, 9, 7, 7, 2, 7, 1])
    drawn = Parts(torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]), torch.tensor([6, 7]))
    parts = same_parts(more, drawn, known, equal_together=False)
    assert [sorted(more[part].tolist()) for part in parts] == [[1, 7, 9], [2, 7], [3, 7, 7]]


@pytest.mark.parametrize("head", ["Gaussian", "Quantiles"])
def test_intervals_are_logged_and_drawn(head: str, houses: Path, work: Path) -> None:
    main(["fit", *SMALL, *TABLE, "--model.head", head])
    run = work / "runs/regression/default"
    assert 0 <= read_metrics(run / "metrics.csv", "val/coverage")[-1] <= 1
    assert read_metrics(run / "metrics.csv", "val/interval_width")[-1] > 0
    assert {path.stem for path in (run / "figures").glob("val-*.png")} == {"val-predictions", "val-residuals"}


@pytest.mark.parametrize("head", [pytest.param("Mean", marks=pytest.mark.matrix), "Quantiles"])
def test_several_targets_have_their_own_metrics_and_predictions(head: str, houses: Path, work: Path) -> None:
    """Losses and metrics without a name are means over the targets; raw rows may lack one."""
    table = house_table()
    table["noise"] = 3.0 * table["floor"] + np.random.default_rng(1).normal(0, 1, ROWS)
    table.to_csv(houses, index=False)
    every = ["--trainer.limit_test_batches", "1.0", "--trainer.limit_predict_batches", "1.0"]
    names = ["rent", "noise"]
    args = ["fit", *SMALL, *TABLE[:-1], "[rent, noise]", "--model.head", head, "--trainer.max_steps", "40", *every]
    cli = main(args)
    targets = cli.datamodule.table.target[cli.datamodule.table.parts.train]
    assert cli.datamodule.columns["mean"] == pytest.approx(targets.mean(0))
    assert cli.datamodule.columns["std"] == pytest.approx(targets.std(0))
    main(["test"])
    main(["predict"])
    run = work / "runs/regression/default"
    found: Any = pd.read_csv(run / "predict/predictions.csv")
    test = found["index"].tolist()
    kinds = {"rmse": lambda *each: math.sqrt(mean_squared_error(*each)), "mae": mean_absolute_error, "r2": r2_score}
    for kind, score in kinds.items():
        expected = [score(table[name][test], found[f"prediction({name})"]) for name in names]
        values = [read_metrics(run / "test/metrics.csv", f"test/{kind}_{name}")[-1] for name in names]
        assert values == pytest.approx(expected, rel=1e-4, abs=1e-5)
        mean = read_metrics(run / "test/metrics.csv", f"test/{kind}")[-1]
        assert mean == pytest.approx(np.mean(expected), rel=1e-4, abs=1e-5)
    for name in names:
        assert found[f"target({name})"].to_numpy() == pytest.approx(table[name][test].to_numpy(), rel=1e-5)
        if head == "Quantiles":
            assert (found[f"lower({name})"] <= found[f"upper({name})"]).all()
    text = (run / "texts/test-baselines.txt").read_text()
    assert text.count("linear regression") == text.count("this net") == 2
    table.head(5).drop(columns="noise").to_csv("new.csv", index=False)
    main(["predict", "--data.predict_source", f"{TABLES}.Table", "--data.predict_source.path", "new.csv"])
    found = pd.read_csv(run / "predict/predictions.csv")
    assert found["target(rent)"].to_numpy() == pytest.approx(table["rent"][:5].to_numpy(), rel=1e-5)
    assert found["target(noise)"].isna().all()
    assert found["prediction(noise)"].notna().all()


def test_outputs_of_several_targets_do_not_mix() -> None:
    """The head gets the outputs of each target beside that target, the members in their order."""
    columns = fitted(house_table())
    columns["targets"], columns["mean"], columns["std"] = ["a", "b"], [10.0, -1.0], [2.0, 0.5]
    module = RegressionModule(TabM, Gaussian(), columns, optimizer=torch.optim.AdamW)
    outputs = torch.arange(24.0).view(2, 3, 4)  # rows, members, outputs: mean and variance of a, then of b
    module.net = lambda *_: outputs  # type: ignore[assignment]
    nothing, real = torch.empty(2, 0), torch.ones(2, dtype=torch.bool)
    found = module.forward(Batch(nothing, nothing.long(), torch.zeros(2, 2), torch.arange(2), real))
    assert torch.equal(found[0], outputs[0, :, :2])
    assert torch.equal(found[1], outputs[0, :, 2:])
    assert torch.equal(found[2], outputs[1, :, :2])
    means = Gaussian().predict(found)[:, 0].view(2, 2)
    assert torch.equal(module.predictions(found)[..., 0], means * torch.tensor([2.0, 0.5]) + torch.tensor([10.0, -1.0]))


@pytest.mark.parametrize(
    "net", ["MLP", *(pytest.param(name, marks=pytest.mark.matrix) for name in ("ResNet", "FTTransformer"))]
)
def test_every_net_learns(net: str, houses: Path, work: Path) -> None:
    flags = ["--model.net", f"common.nets.tables.{net}", "--trainer.max_steps", "60", "--data.batch_size", "32"]
    main(["fit", *SMALL, *TABLE, *flags, "--trainer.limit_val_batches", "1.0", "--model.optimizer.lr", "0.003"])
    assert read_metrics(work / "runs/regression/default/metrics.csv", "val/r2")[-1] > 0.5


# Mistakes


@pytest.fixture
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Lightning logs goes to stdout in a process of its own; here it would stand on stderr."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])


def refused(args: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that a command line ends in."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers = []
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(args)
    error = capfd.readouterr().err
    assert exit_.value.code == 2, error
    assert len(error.splitlines()) == 1, error
    assert len(error) <= 241, error
    return error.strip()


def lines(*extra: str, rows: int = 60, head: str = "size,kind,rent") -> str:
    body = [f"{10 + n},{'ab'[n % 2]},{n * 3 % 50}" for n in range(rows)]
    return "\n".join([head, *body, *extra]) + "\n"


def case(text: str | bytes | None, flags: str, where: str, key: str, hint: str | None = None) -> Any:
    """A file ``houses.csv``, flags, and what the line begins with, names and suggests."""
    return pytest.param(text, shlex.split(flags), where, key, hint, id=f"{where} {key}")


GAPS = "\n".join(["size,kind,rent", *(f",{'ab'[n % 2]},{n * 3 % 50}" for n in range(60))])
SOURCE = "--data.source"
NET = "--model.net common.nets.tables."
# fmt: off
MISTAKES = [
    case(lines(), f"{SOURCE}.target price", f"{SOURCE}.target", "no such column among ['size', 'kind', 'rent']"),
    case(lines(), f"{SOURCE}.target rnt", f"{SOURCE}.target", "no such column", "rent"),
    case(lines(), f"{SOURCE}.target null", f"{SOURCE}.target", "is null, but training needs it"),
    case(lines(), f"{SOURCE}.categorical [knd]", f"{SOURCE}.categorical", "no such column", "kind"),
    case(lines(), f"{SOURCE}.drop [knd]", f"{SOURCE}.drop", "no such column", "kind"),
    case(lines(), f"{SOURCE}.drop [rent]", f"{SOURCE}.target", "is also listed in categorical or drop"),
    case(lines(), f"{SOURCE}.drop [size,kind]", f"{SOURCE}.path", "has no column beside the target"),
    case(lines(), f"{SOURCE}.target_unit 0", f"{SOURCE}.target_unit", "must be above 0, got 0.0"),
    case(lines(), f"{SOURCE}.target_unit=-1", f"{SOURCE}.target_unit", "must be above 0, got -1.0"),
    case(lines(), f"{SOURCE}.path huses.csv", f"{SOURCE}.path", "no such file", "houses.csv"),
    case(lines(), f"{SOURCE} {TABLES}.Diabetse", SOURCE, f"no 'Diabetse' in {TABLES}", "Diabetes"),
    case("", "", f"{SOURCE}.path", "houses.csv: cannot be read"),
    case(b"\x00\xff\xfe" * 99, "", f"{SOURCE}.path", "houses.csv is not written in utf-8"),
    case("size,kind,rent\n", "", f"{SOURCE}.path", "houses.csv: has no rows"),
    case(lines(head="size,size,rent"), "", f"{SOURCE}.path", "has two columns named 'size'; rename one"),
    case(lines("x,a,3"), "", f"{SOURCE}.path", "column 'size': 'x' in row 60 is no number; mend it"),
    case(lines("inf,a,3"), "--data.split_seed 1", f"{SOURCE}.path", "column 'size': the number in row 60 is infinite"),
    case(GAPS, "", f"{SOURCE}.path", "column 'size' has no value in the training rows; list it in data.source.drop"),
    case(lines("3,a,"), "", f"{SOURCE}.target", "'rent': 1 of 61 values are missing or infinite; drop those rows"),
    case(lines("3,a,inf"), "", f"{SOURCE}.target", "the number in row 60 is infinite; mend it"),
    case(lines("3,a,dear"), "", f"{SOURCE}.target", "'dear' in row 60 is no number; mend it"),
    case(lines(), f"{SOURCE}.target kind", f"{SOURCE}.target", "'kind': holds words, such as 'a'; a class is for"),
    case(lines(), f"{SOURCE}.target '[rent, kind]'", f"{SOURCE}.target", "--config recipes/classification/table.yaml"),
    case(re.sub(r"(?m)(?<=[ab],)(\d+)$", lambda m: str(int(m[1]) % 2), lines()), "", f"{SOURCE}.target",
         "'rent': holds two values, 0 and 1; a class is for recipes/classification/train.py"),
    case(re.sub(r"(?m)(?<=[ab],)(\d+)$", lambda m: str(int(m[1]) % 2 > 0), lines()), "", f"{SOURCE}.target",
         "'rent': holds true and false; a class is for"),
    case(lines(), f"{SOURCE}.target '[rent, rent]'", f"{SOURCE}.target", "lists 'rent' twice; list it once"),
    case(lines(), f"{SOURCE}.target []", f"{SOURCE}.target", "is null, but training needs it"),
    case(lines(rows=6), "", f"{SOURCE}.path", "6 rows are too few: each part needs at least 2"),
    case(re.sub(r",\d+$", ",7", lines(), flags=re.M), "", f"{SOURCE}.target", "is 7 in every training row"),
    case(re.sub(r"^\d+,", "7,", lines(), flags=re.M), "", f"{SOURCE}.path", "column 'size' is 7 in every training row"),
    case(lines(), f"{SOURCE}.categorical [size]", f"{SOURCE}.path", "none of its 42 categories has 5 training rows"),
    case(lines(), "--data.rare 0", "--data.rare", "must be at least 1, got 0"),
    case(lines(), "--data.val_fraction 0", "--data.val_fraction", "must be above 0 and below 1, got 0.0"),
    case(lines(), "--data.val_fraction 0.95", "--data.val_fraction", "0.2 must leave samples to train on"),
    case(lines(), "--data.split_seed=-1", "--data.split_seed", "must be in [0, 2**32), got -1"),
    case(lines(), "--data.scaling quantiles", "--data.scaling", "quantiles", "quantile"),
    case(lines(), "--data.facts_of x.ckpt", "--data.facts_of", "no such checkpoint x.ckpt"),
    case(lines(), "--model.columns {}", "--model.columns", "is taken from data.columns"),
    case(lines(), "--model.head Quantiles --model.head.quantiles [0.1,0.5,1.5]", "--model.head.quantiles",
         "must ascend between 0 and 1, got [0.1, 0.5, 1.5]"),
    case(lines(), "--model.head Quantiles --model.head.quantiles [0.9,0.5,0.1]", "--model.head.quantiles",
         "must ascend between 0 and 1"),
    case(lines(), "--model.head Quantiles --model.head.quantiles [0.1,0.9]", "--model.head.quantiles",
         "must have 0.5, the prediction"),
    case(lines(), "--model.head Gaussian --model.head.level 1", "--model.head.level",
         "must be between 0 and 1, got 1.0"),
    case(lines(), "--model.head Gausian", "--model.head", "no class 'Gausian'", "Gaussian"),
    case(lines(), "--model.net.n_bins 500", "--model.net.n_bins", "must be from 2 to 41 for so many training rows"),
    case(lines(), "--model.net.n_blocks 0", "--model.net.n_blocks", "must be above 0, got 0"),
    case(lines(), "--model.net.k 0", "--model.net.k", "must be above 0, got 0"),
    case(lines(), "--model.net.d_embedding=-1", "--model.net.d_embedding", "must be above 0, got -1"),
    case(lines(), f"{NET}FTTransformer --model.net.n_blocks=-1", "--model.net.n_blocks", "must be above 0, got -1"),
    case(lines(), f"{NET}FTTransformer --model.net.attention_n_heads 0", "--model.net.attention_n_heads",
         "must be above 0, got 0"),
    case(lines(), f"{NET}FTTransformer --model.net.ffn_d_hidden_multiplier 0.001",
         "--model.net.ffn_d_hidden_multiplier", "must leave a width of at least 1 with d_block 64, got 0.001"),
    case(lines(), f"{NET}ResNet --model.net.d_hidden_multiplier 0", "--model.net.d_hidden_multiplier",
         "must leave a width of at least 1 with d_block 192, got 0"),
    case(lines(), f"{NET}MLP --model.net.d_block=-1", "--model.net.d_block", "must be above 0, got -1"),
    case(lines(), f"{NET}MLP --model.net.dropout 2", "--model.net.dropout",
         "dropout probability has to be between 0 and 1"),
    case(lines(), "--model.net tabm.TabM", "--model.net", "tabm.TabM may not be imported"),
    case(lines(), f"{NET}FTTransformer --model.net.d_block 9", "--model.net.d_block",
         "must be a multiple of"),
]
# fmt: on


@pytest.mark.parametrize(("text", "flags", "where", "key", "hint"), halved(MISTAKES))
def test_refused_before_the_run_starts(
    text: str | bytes, flags: list[str], where: str, key: str, hint: str | None, work: Path,
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    kept = work / "runs/regression/default/kept"
    kept.parent.mkdir(parents=True)
    kept.write_text("weeks of work")
    Path("houses.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    skip = RecipeCLI.subcommands()["fit"]
    monkeypatch.setattr(RecipeCLI, "subcommands", staticmethod(lambda: {"fit": skip}))
    line = refused(["fit", *SMALL, *TABLE, *flags], capfd)
    assert line.startswith(f"{where}: " if where else ""), line
    assert key in line
    assert re.findall(r"did you mean '([^']*)'", line) == ([hint] if hint else []), line
    assert kept.read_text() == "weeks of work"
    assert [path.name for path in kept.parent.parent.iterdir()] == ["default"]


def test_rows_that_cannot_be_predicted(houses: Path, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(["fit", *SMALL, *TABLE])
    table = pd.read_csv(houses)
    rows = ["--data.predict_source", "common.sources.tables.Table", "--data.predict_source.path", "new.csv"]
    for changed, problem in (
        (table.drop(columns="size").rename(columns={"district": "distrct"}), "lacks the column 'size'"),
        (table.rename(columns={"district": "distrct"}), "did you mean 'distrct'?"),
        (table.assign(size="large"), "column 'size': 'large' in row 0 is no number; mend it"),
        (table.assign(rent="much"), "column 'rent': 'much' in row 0 is no number; mend it"),
        (table.iloc[:0], "has no rows"),
    ):
        changed.to_csv("new.csv", index=False)
        line = refused(["predict", *rows], capfd)
        assert problem in line
        assert "data.source" not in line
    for keep in ([], ["--data.keep", "rent"]):
        missing = refused(["predict", *rows[:-1], "nw.csv", *keep], capfd)
        assert missing.startswith("--data.predict_source.path: nw.csv: no such file; did you mean 'new.csv'?")


def test_diabetes_is_in_its_own_units() -> None:
    frame = Diabetes().read()
    assert frame.shape == (442, 11)
    assert frame["age"].between(18, 80).all()
    assert set(frame["sex"]) == {1, 2}


def test_what_encodes_rows_is_in_the_checkpoint(houses: Path, work: Path) -> None:
    """All that the data has fitted, as plain values: it is read without running code."""
    cli = main(["fit", *SMALL, *TABLE])
    saved = read_checkpoint(work / "runs/regression/default/checkpoints/best.ckpt")["hyper_parameters"]["columns"]
    assert saved == cli.datamodule.columns
    assert {"lift", "district"} <= saved["categorical"].keys()
    assert {"size", "floor"} <= saved["numeric"].keys()


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet"])
def test_the_number_of_a_row_is_no_column(
    name: str, houses: Path, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a file sorted by its target it would tell the target."""
    frame: Any = pd.read_csv(houses).sort_values("rent")
    (frame.to_csv if name.endswith("csv") else frame.to_parquet)(name)
    table = ["--data.source", "common.sources.tables.Table", "--data.source.path", name, "--data.source.target", "rent"]
    line = refused(["fit", *SMALL, *table], capfd)
    index = "Unnamed: 0" if name.endswith("csv") else "__index_level_0__"
    assert f"has a column without a name, {index!r}, as pandas writes an index; list it in data.source.drop" in line
    cli = main(["fit", *SMALL, *table, "--data.source.drop", json.dumps([index])])
    assert index not in cli.datamodule.columns["numeric"]
