"""The table of results names every recipe, and says so when a config has changed since a number was measured."""

import json
from pathlib import Path

from benchmarks.results import PAGE, STORE, config_hash, decisive, measured, render, rows
from tests.support import MEASURED


def test_the_page_shows_what_was_measured() -> None:
    """Nothing on the page but what the store holds; a changed config shows as stale."""
    store = json.loads(STORE.read_text())
    seven = ["adversarial", "classification", "curriculum", "distillation", "lm", "multitask", "regression"]
    assert set(seven) <= {row.recipe for row in measured(store)} == set(MEASURED)
    hashes = {row.key: config_hash(row) for row in measured(store)}
    assert render(store, hashes) == PAGE.read_text(), "make results renders it anew"


def test_the_hash_is_that_of_values() -> None:
    row = next(row for row in rows() if row.recipe == "classification")
    changed = row._replace(fit=(*row.fit, "--model.optimizer.lr", "0.5"))
    assert config_hash(changed) != config_hash(row)
    same = row._replace(fit=(*row.fit, "--seed_everything", "1"))
    assert config_hash(same) == config_hash(row), "what the recipe's own config says already"


def test_the_hash_leaves_out_what_decides_nothing() -> None:
    bar, stop = ({"class_path": name} for name in ("common.run.callbacks.RunProgressBar", "EarlyStopping"))
    config = {
        "seed_everything": 1, "name": "a", "best": {"monitor": "val/loss"}, "media": {"every_n_validations": 1},
        "data": {"source": {"class_path": "common.sources.Digits", "init_args": {}}}, "model": {"loss": [1.0]},
        "trainer": {"max_epochs": 3, "callbacks": [bar], "logger": None, "default_root_dir": "here"},
    }  # fmt: skip
    moved = json.loads(
        json.dumps(config).replace("common.sources.Digits", "recipes.mine.data.Digits").replace("here", "there")
    )
    assert decisive(moved) == decisive(config)
    for text, other in (
        ("Digits", "IDX"),
        ("val/loss", "val/f1"),
        ("[1.0]", "[2.0]"),
        ('"max_epochs": 3', '"max_epochs": 4'),
        (json.dumps([bar]), json.dumps([bar, stop])),
    ):
        assert decisive(json.loads(json.dumps(config).replace(text, other))) != decisive(config)


def test_the_hash_knows_how_a_teacher_is_trained(tmp_path: Path) -> None:
    row = next(row for row in rows() if row.recipe == "distillation")
    (tmp_path / "other.yaml").write_text("model: {l1: 0.1}\n")
    named = row._replace(fit=("--model.teacher_training", str(tmp_path / "other.yaml")))
    before = config_hash(named)
    (tmp_path / "other.yaml").write_text("model: {l1: 0.2}\n")
    config_hash.cache_clear()
    assert config_hash(named) != before


def test_a_stale_number_is_marked() -> None:
    row = rows()[0]
    kept = {"hash": "0" * 8, "values": [0.5, 0.6, 0.7], "seconds": [1, 2, 3], "python": "3", "torch": "2"}
    hashes = {row.key: "1" * 8 for row in rows()}
    line = next(line for line in render({row.key: kept}, hashes).splitlines() if row.command in line)
    assert "`00000000` stale" in line
    assert ("60.00 ± 10.00 %" if row.percent else "0.6 ± 0.1") in line
    fresh = render({row.key: {**kept, "hash": "1" * 8}}, hashes)
    assert "stale |" not in fresh
