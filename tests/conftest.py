"""Fixtures of all tests."""

import os
import shutil
import tempfile
from collections.abc import Iterator

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it, and share the prepared corpora
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="recipes-cache-")

from pathlib import Path

import pytest
import torch

import common.run.media
import common.run.output
import common.run.record
from tests.support import RECIPES, ROOT, code_hash, small_args

PASSED = pytest.StashKey[Path]()

torch.set_num_threads(1)  # two workers on two cores; small nets gain nothing from more


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--go-on", action="store_true", help="leave out what has passed with the present code")


def pytest_configure(config: pytest.Config) -> None:
    """With ``--go-on`` a long sweep goes on where it was stopped: a file of the code's hash lists what has passed."""
    if config.getoption("--go-on"):
        config.stash[PASSED] = ROOT / ".passed" / code_hash()
        config.pluginmanager.register(GoOn(config.stash[PASSED]))


class GoOn:
    """Leaves out tests that have passed, and notes those that pass."""

    def __init__(self, file: Path):
        self.file, self.passed = file, set(file.read_text().splitlines()) if file.exists() else set()

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if item.nodeid in self.passed:
            pytest.skip("has passed with this code")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed and "PYTEST_XDIST_WORKER" in os.environ:
            self.file.parent.mkdir(exist_ok=True)
            with self.file.open("a") as file:  # a short line is written at once
                file.write(f"{report.nodeid}\n")


def pytest_unconfigure() -> None:
    """Remove the shared cache when the last process is done."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What Lightning and DeepSpeed tell their ranks by variables must not reach the next test, which would wait."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def no_failure_is_spared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture, report or logger that fails, which costs a user's run nothing, fails its test, here and in forks."""

    def fail(what: str, error: Exception) -> None:
        raise error

    monkeypatch.setattr(common.run.output, "tell", fail)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return tmp_path


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at numbers, here and in forks: drawing a run's report takes longer than a small training.

    Reports are drawn in tests of the recipes and of the loggers, and by every command of the docs.
    """
    monkeypatch.setattr(common.run.record, "write_report", lambda folder, title, best: folder / "report.html")
    monkeypatch.setattr(common.run.media, "draw_samples", lambda *_: None)


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 60,000 characters, real English: the licences of Python and its libraries."""
    import pydoc_data.topics as topics

    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n\n".join(topics.topics.values())[:60_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def lm_args(small_text: Path) -> list[str]:
    """Arguments that make the lm recipe small."""
    net = "--model.config.init_args"
    return [
        "--data.path", str(small_text), "--data.context", "32",
        "--data.tokenizer", "common.sources.tokenizers.Characters",
        f"{net}.hidden_size", "32", f"{net}.intermediate_size", "64", f"{net}.num_hidden_layers", "2",
        f"{net}.num_attention_heads", "2", "--model.sample_tokens", "16",
    ]  # fmt: skip


@pytest.fixture
def plain_args(small_text: Path) -> dict[str, list[str]]:
    """Small nets without dropout or batch norm for each recipe."""
    return {recipe: small_args(recipe, small_text) for recipe in RECIPES}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that tests have recorded as ``summary``, whichever worker ran them."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in report.user_properties:
                if name == "summary":
                    terminalreporter.write_line(str(value))
