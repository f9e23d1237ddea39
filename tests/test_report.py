"""The report of a run, read back from the real files that Lightning's CSVLogger and the figures leave."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from common.figures import (
    PALETTE,
    STAGES,
    captioned_images,
    new_figure,
    plot_lines,
    read_metrics,
    save_figure,
    style_axes,
)
from common.run.folder import merge_metrics
from common.run.report import Best, learning_curves, learning_rate, write_report
from recipes.classification.pictures import confusion_matrix
from recipes.multitask.pictures import task_weights


def log(folder: Path, rows: dict[int, dict[str, float]], start: int = 0) -> None:
    """Writes one metrics.csv as a training run does, `epoch` included."""
    logger = CSVLogger(folder.parent, name=folder.name, version="")
    for step, row in rows.items():
        logger.log_metrics({"epoch": step // 50, **row}, step=step)
    logger.save()


def make_run(folder: Path, metrics: tuple[str, ...] = ("accuracy",)) -> Path:
    rows: dict[int, dict[str, float]] = {}
    for step in range(0, 200, 2):
        rows[step] = {
            "train/loss": 2 / (1 + step / 40),
            "optim/lr": 1.0e-3,
            "optim/grad_norm": 1.0 + step % 3,
        }
        rows[step]["perf/samples_per_second"] = 12345.6
    for step, loss in ((49, 1.2), (99, 0.8), (149, 0.6), (199, 0.7)):
        rows[step] = {"val/loss": loss, **{f"val/{name}": 1 - loss / 2 for name in metrics}}
    log(folder, dict(sorted(rows.items())))
    return folder


def pixels(figure: Figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer)
    return np.asarray(Image.open(buffer).convert("RGB"))


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


class Page(HTMLParser):
    """What a browser would show and load."""

    VOID = ("meta", "img")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(self.source)
        self.close()
        assert not self.open, "unclosed tags"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    @property
    def table(self) -> dict[str, list[str]]:
        rows = re.findall(r"<tr><th>(.*?)</th>(.*?)</tr>", self.source)
        return {name: re.findall(r"<td>(.*?)</td>", cells) for name, cells in rows}


def test_sparse_rows_become_series_without_gaps_and_non_finite_values(tmp_path: Path) -> None:
    rows = {0: {"train/loss": 3.0}, 1: {"train/loss": float("nan")}, 2: {"val/loss": 2.5, "train/loss": 2.0}}
    log(tmp_path / "run", rows | {3: {"val/loss": float("inf")}})
    assert read_metrics(tmp_path / "run") == {
        "train/loss": ([0, 2], [3.0, 2.0]),
        "val/loss": ([2], [2.5]),
    }
    assert read_metrics(tmp_path / "nothing") == {}


# Each list of (first step, last step) is in the order of writing; every row holds the writer's number.
@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        ([(0, 14), (10, 23), (20, 25)], [0] * 10 + [1] * 10 + [2] * 6),
        ([(0, 14), (10, 16), (5, 7)], [0] * 5 + [2] * 3),  # the second resume went back behind the first
        ([(0, 14), (10, 12), (10, 11)], [0] * 10 + [2] * 2),  # twice from the same step
        ([(0, 14), (10, 9)], [0] * 10),  # it has logged nothing
    ],
)
def test_rows_of_resumed_runs_merge(tmp_path: Path, starts: list[tuple[int, int]], expected: list[int]) -> None:
    for number, (first, last) in enumerate(starts):
        log(tmp_path / "new", {step: {"train/loss": float(number)} for step in range(first, last + 1)})
        merge_metrics(tmp_path / "metrics.csv", tmp_path / "new/metrics.csv", first)
        shutil.move(tmp_path / "new/metrics.csv", tmp_path / "metrics.csv")
    steps, values = read_metrics(tmp_path)["train/loss"]
    assert steps == list(range(len(expected)))
    assert values == expected


def test_half_a_line_of_a_killed_run_is_left_out(tmp_path: Path) -> None:
    log(tmp_path / "run", {0: {"train/loss": 1.25}, 1: {"train/loss": 1.125}})
    path = tmp_path / "run" / "metrics.csv"
    path.write_bytes(path.read_bytes().rstrip()[:-2])
    assert read_metrics(tmp_path / "run") == {"train/loss": ([0], [1.25])}


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_learning_curves_have_a_panel_per_metric_and_mark_the_best(tmp_path: Path, count: int) -> None:
    names = tuple(f"metric_{place}" for place in range(count - 1))
    figure = learning_curves(read_metrics(make_run(tmp_path / "run", names)))
    assert figure is not None
    assert titles(figure) == ["loss", *(name.replace("_", " ") for name in names)]
    assert figure.axes[0].get_title(loc="right") == "best val 0.6"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(labels) == ["lowest val/loss (step 150)", "train", "val"]
    image = pixels(figure)
    for color in STAGES.values():
        rgb = np.array([int(color[place : place + 2], 16) for place in (1, 3, 5)])
        assert (np.abs(image.astype(int) - rgb).max(axis=-1) < 3).sum() > 200, "a curve is missing"


def test_the_best_is_that_of_the_checkpoint() -> None:
    series = {"val/loss": ([9, 19, 29], [0.4, 0.5, 0.6]), "val/accuracy": ([9, 19, 29], [0.7, 0.8, 0.8])}
    best = Best("val/accuracy", "max")
    assert best.find(series) == (19, 0.8)
    figure = learning_curves(series, best)
    assert figure is not None
    assert [axes.get_title(loc="right") for axes in figure.axes] == ["", "best val 0.8"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert "highest val/accuracy (step 20)" in labels
    figure = learning_curves(series, Best("optim/lr", "max"))
    assert figure is not None
    assert [axes.get_title(loc="right") for axes in figure.axes] == ["", ""]


def test_learning_rates_of_groups_and_gradient_norm(tmp_path: Path) -> None:
    both = learning_rate(read_metrics(make_run(tmp_path / "run")))
    assert both is not None
    assert titles(both) == ["learning rate", "gradient norm"]
    groups = {"optim/lr-body": ([0, 1], [0.1, 0.2]), "optim/lr-head": ([0, 1], [1.0, 2.0])}
    figure = learning_rate(groups)
    assert figure is not None
    assert titles(figure) == ["learning rate"]
    drawn = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in figure.axes[0].lines}
    assert drawn == {"lr-body": [0.1, 0.2], "lr-head": [1.0, 2.0]}


def test_weights_are_drawn_where_they_change() -> None:
    series = {"optim/weight_left": ([1, 2], [1.0, 0.8]), "optim/weight_right": ([1, 2], [1.0, 1.2])}
    figure = task_weights(series, ["left", "right", "depth"])
    assert figure is not None
    drawn = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in figure.axes[0].lines}
    assert drawn == {"left": [1.0, 0.8], "right": [1.0, 1.2]}
    assert task_weights({"optim/weight_left": ([1, 2], [0.5, 0.5])}, ["left"]) is None


def test_nothing_logged_draws_nothing() -> None:
    assert learning_curves({"test/loss": ([1], [1.0])}) is None
    assert learning_rate({"train/loss": ([1], [1.0])}) is None


def test_confusion_matrix_writes_counts_and_recall() -> None:
    counts = torch.tensor([[6, 2, 0], [1, 9, 0], [0, 0, 0]])
    figure = confusion_matrix(counts, ["ham", "spam", "a class with a very long name"])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["6", "2", "0", "1", "9", "0", "0", "0", "0"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["ham", "spam", "a class with a ve…"]
    assert [text.get_text() for text in axes.child_axes[0].get_yticklabels()] == ["0.750", "0.900", "–"]
    assert axes.get_title(loc="left") == "accuracy 83.33%"
    shares = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(shares, [[0.75, 0.25, 0], [0.1, 0.9, 0], [0, 0, 0]])
    assert len(np.unique(pixels(figure).reshape(-1, 3), axis=0)) > 50


def test_confusion_matrix_of_many_classes_stays_readable() -> None:
    figure = confusion_matrix(torch.eye(120, dtype=torch.long) * 5, [f"class {place}" for place in range(120)])
    pixels(figure)
    boxes = [text.get_window_extent() for text in figure.axes[0].get_yticklabels()]
    assert not figure.axes[0].texts
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes)), "labels overlap"


def test_report_is_one_self_contained_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    log(run / "test", {200: {"test/loss": 0.654321, "test/accuracy": 0.98765}})
    log(run / "validate", {200: {"val/loss": 0.61}})
    for folder in ("figures", "texts"):
        (run / folder).mkdir()
    matrix = confusion_matrix(torch.eye(3, dtype=torch.long), list("abc"))
    matrix.savefig(run / "figures" / "test-confusion_matrix.png")
    (run / "texts" / "val-samples.txt").write_text("To be\nor not", encoding="utf-8")
    (run / "config.yaml").write_text("seed: 1\n", encoding="utf-8")
    (run / "environment.json").write_text(json.dumps({"torch": "2.13.0", "commit": "abc"}), encoding="utf-8")

    path = write_report(run, "lm / first")
    page = Page(path)

    assert path == run / "report.html"
    assert not list(run.glob("*.tmp"))
    assert page.texts["h1"] == page.texts["title"] == ["lm / first"]
    assert page.texts["h2"] == ["Metrics", "Pictures", "val: samples"]
    assert page.texts["summary"] == ["Configuration", "Environment"]
    assert page.texts["pre"] == ["To be\nor not", "seed: 1\n", "torch: 2.13.0\ncommit: abc"]
    assert page.texts["figcaption"] == ["learning curves", "learning rate", "test: confusion matrix"]
    heads = ["train, last", "val, last", "val, lowest loss", "validate", "test"]
    assert page.texts["td"][: len(heads)] == heads
    assert page.table["loss"] == ["0.3361", "0.7", "0.6", "0.61", "0.6543"]
    assert page.table["accuracy"] == ["–", "0.65", "0.7", "–", "0.9877"]
    assert page.table["perf/samples_per_second"] == ["12,346"]

    assert not {"script", "link", "iframe", "object", "base", "a"} & set(page.tags)
    assert not re.search(r"://|@import|url\(", page.source)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    drawn = [base64.b64decode(link.partition(",")[2]) for link in page.links]
    names = ("learning_curves", "learning_rate", "test-confusion_matrix")
    assert drawn == [(run / "figures" / f"{name}.png").read_bytes() for name in names]
    assert "prefers-color-scheme: dark" in page.source


def test_report_escapes_everything_it_is_given(tmp_path: Path) -> None:
    bad = "<script>alert('&')</script>"
    log(tmp_path, {0: {f"val/{bad}": 1.0, "val/loss": 1.0, f"perf/{bad}": 1.0}})
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a<b>.txt").write_text(bad, encoding="utf-8")
    (tmp_path / "figures").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "figures" / 'x" onload="y.png')
    (tmp_path / "config.yaml").write_text(bad + " $body", encoding="utf-8")
    (tmp_path / "environment.json").write_text(json.dumps({bad: bad}), encoding="utf-8")
    page = Page(write_report(tmp_path, bad))
    assert not {"script", "b"} & set(page.tags)
    assert page.texts["h1"] == [bad]
    assert page.texts["pre"] == [bad, bad + " $body", f"{bad}: {bad}"]
    assert page.texts["h2"] == ["Metrics", "Pictures", "a<b>"]
    assert 'x" onload="y' in page.texts["figcaption"]
    assert "onload" not in re.sub(r"&quot; onload=&quot;", "", page.source)


def test_report_of_an_empty_run_and_again_after_training(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    metrics = (tmp_path / "run" / "metrics.csv").rename(tmp_path / "kept.csv")
    empty = Page(write_report(tmp_path / "run", "empty"))
    assert empty.texts["h1"] == ["empty"]
    assert not {"h2", "img", "table", "details"} & set(empty.tags)
    metrics.rename(tmp_path / "run" / "metrics.csv")
    assert Page(write_report(tmp_path / "run", "trained")).texts["h2"] == ["Metrics", "Pictures"]


def test_drawing_keeps_no_figure_alive() -> None:
    import matplotlib.pyplot

    learning_curves({"val/loss": ([1, 2], [2.0, 1.0])})
    assert matplotlib.pyplot.get_fignums() == []


def test_no_text_of_a_picture_is_a_formula(tmp_path: Path) -> None:
    """Names with dollars stay as they are, as do the numbers of a logarithmic axis; matplotlib is left as it was."""
    figure = new_figure(4.0, 2.0)
    axes = figure.subplots()
    plot_lines(axes, {"a": ([*range(200)], [10 * 0.97**step for step in range(200)])}, PALETTE)
    style_axes(axes, "$x$ and \\frac")
    axes.set_xticks([0, 100], ["$\\nonsense$", "$"])
    save_figure(figure, tmp_path / "a.png")
    shown = {label.get_text() for label in axes.get_yticklabels()}
    assert {"0.1", "1", "10"} <= shown
    assert not any(text.get_parse_math() for text in figure.findobj(Text))
    assert matplotlib.rcParams["text.parse_math"]


def test_captions_do_not_overlap() -> None:
    """A long one takes several lines below its own image."""
    captions = [
        "#50 loss 0.3812\nred, round, line, thin, small, dotted → red, round, line, thin, small, dotted",
        "short",
    ]
    figure = captioned_images(torch.rand(8, 3, 8, 8), captions * 4, [True] * 8, "title")
    figure.canvas.draw()
    places = [text.get_window_extent() for axes in figure.axes for text in axes.texts]
    assert len(places) == 8
    assert not any(one.overlaps(other) for n, one in enumerate(places) for other in places[:n])
    assert all(place.y0 >= 0 and place.x0 >= 0 for place in places)
