"""The table of results names every recipe, and says so when a config has changed since a number was measured."""

import json
from pathlib import Path

from benchmarks.results import PAGE, STORE, config_hash, render, rows
from tests.support import RECIPES


def test_every_recipe_has_a_row_on_the_page() -> None:
    assert sorted({row.recipe for row in rows()}) == RECIPES
    page = PAGE.read_text()
    assert all(f"`{row.command}`" in page for row in rows())


def test_the_page_shows_what_was_measured() -> None:
    """Nothing on the page but what the store holds; a changed config shows as stale."""
    store = json.loads(STORE.read_text()) if STORE.exists() else {}
    hashes = {row.key: config_hash(row) for row in rows()}
    assert render(store, hashes) == PAGE.read_text(), "make results renders it anew"


def test_the_hash_is_that_of_values() -> None:
    row = next(row for row in rows() if row.recipe == "classification")
    changed = row._replace(fit=(*row.fit, "--model.optimizer.lr", "0.5"))
    assert config_hash(changed) != config_hash(row)
    same = row._replace(fit=(*row.fit, "--seed_everything", "1"))
    assert config_hash(same) == config_hash(row), "what the recipe's own config says already"


def test_the_hash_knows_how_a_teacher_is_trained(tmp_path: Path) -> None:
    row = next(row for row in rows() if row.recipe == "distillation")
    (tmp_path / "other.yaml").write_text("# Another.\n")
    named = row._replace(fit=("--model.teacher_training", str(tmp_path / "other.yaml")))
    before = config_hash(named)
    (tmp_path / "other.yaml").write_text("# Yet another.\n")
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
