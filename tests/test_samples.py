"""The first batch as the net sees it and the samples with the highest losses: training stays the same."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import common.run.media
from common.figures import captioned_images
from common.losses import HighestLosses, item_cross_entropy
from common.run.samples import FirstBatch, draw_samples, labels
from tests.support import TINY, logs, main_of, run_ranks, small_args

FIT = [*TINY, "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]


def test_highest_losses_are_kept_over_batches() -> None:
    found, losses = HighestLosses(3), torch.tensor([0.5, 3.0, float("nan"), 2.0, 9.0, 1.0, 4.0])
    for first in (0, 3, 5):
        found.add(
            losses[first : first + 3][: 3 if first != 3 else 2],
            torch.arange(7)[first : first + 3][: 3 if first != 3 else 2],
        )
    assert found.positions.tolist() == [4, 6, 1]
    assert found.losses.tolist() == [9.0, 4.0, 3.0]


def test_classes_of_a_task_are_named_by_its_own_names() -> None:
    """Others by their numbers; a sample without a label by nothing."""
    target = {"left": torch.tensor([1, 0]), "parity": torch.tensor([1, -1]), "far": torch.tensor([0.5, 2.0])}
    batch, facts = SimpleNamespace(target=target), {"class_names": ["cat", "dog"], "task_classes": {"left": ["a", "b"]}}
    assert labels(batch, facts) == ["left b\nparity 1\nfar 0.5", "left a\nfar 2"]
    assert labels(SimpleNamespace(target=torch.tensor([1, -1])), facts) == ["dog", ""]


def test_the_loss_of_each_item() -> None:
    logits, target = (
        torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[1, -100, 4], [0, 2, -100]]),
    )
    each = item_cross_entropy(logits, target)
    wanted = -logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(each, torch.where(target < 0, 0.0, wanted))


def test_the_first_inputs_by_name() -> None:
    class Net(nn.Module):
        def forward(self, numeric: torch.Tensor, categorical: torch.Tensor, flag: bool = True) -> torch.Tensor:
            return numeric

    net, numbers = Net(), torch.rand(20, 3)
    first = FirstBatch(net)
    net(numbers, categorical=torch.ones(20, 1), flag=False)
    net(torch.zeros(20, 3), torch.zeros(20, 1))
    taken = first.take()
    assert taken.keys() == {"numeric", "categorical"}
    assert torch.equal(taken["numeric"], numbers[:12])
    assert not net._forward_pre_hooks


def test_a_first_batch_that_fails_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Net(nn.Linear):
        forward = torch.jit.script(torch.nn.functional.relu)  # which has no signature

    monkeypatch.undo()
    net = Net(3, 2)
    first = FirstBatch(net)
    assert net(torch.zeros(4, 3)).shape == (4, 3)
    assert first.take() == {}
    assert "the first batch failed, which ends no run" in capsys.readouterr().err


def test_what_is_drawn() -> None:
    columns = {
        "numeric": {"size": {"has_missing": True}, "weight": {"has_missing": False}},
        "categorical": {"kind": ["ape", "bee"]},
    }
    rows = {"numeric": torch.tensor([[0.5, -1.0], [2, 3]]), "categorical": torch.tensor([[2, 0], [0, 1]])}
    text = draw_samples(rows, ["#4\nloss 1", ""], {"columns": columns}, "rows")
    assert isinstance(text, str)
    assert [line.split() for line in text.splitlines()] == [
        ["rows"], [], ["size", "weight", "kind", "size", "missing"],
        ["#4,", "loss", "1", "0.50", "-1.00", "ape", "no"], ["2.00", "3.00", "other", "yes"],
    ]  # fmt: skip
    assert draw_samples({"waves": torch.zeros(2, 9)}, [], {}, "") is None
    assert draw_samples({}, [], {}, "") is None
    figure = captioned_images(torch.rand(7, 3, 4, 6), ["a\nb"] * 7, [True] * 6 + [False], "title")
    assert len(figure.axes[0].images) == 7
    heights = [image.get_extent() for image in figure.axes[0].images]
    assert all(abs((top - low) / (right - left) - 4 / 6) < 1e-6 for left, right, low, top in heights)


def test_images(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst of the test part are those of the predictions; the first batch is augmented; training is the same."""
    drawn: dict[str, Any] = {}

    def note(inputs: Any, captions: Any, facts: Any, title: str) -> Any:
        drawn[title] = inputs["pixel_values"], captions
        return draw_samples(inputs, captions, facts, title)

    monkeypatch.setattr(common.run.media, "draw_samples", note)
    main = main_of("classification")
    plain = main(["fit", *FIT, "--media.every_n_validations", "0"]).model.state_dict()
    run = Path("runs/classification/default")
    assert not (run / "figures/train-first_batch.png").exists()
    cli = main(["fit", *FIT])
    assert all(torch.equal(value, plain[name]) for name, value in cli.model.state_dict().items())
    first, labels = drawn["a batch as the net sees it"]
    images, targets = cli.datamodule.samples.labelled.inputs["pixel_values"], cli.datamodule.samples.labelled.target
    assert len(first) == len(labels) == cli.datamodule.batch_size
    same = [(image == each).all().item() for each in first for image in images[: len(images) // 10]]
    assert not any(same)
    assert {*labels} <= {str(number) for number in targets.tolist()}
    assert (run / "figures/train-first_batch.png").stat().st_size > 2000
    every = ["--trainer.limit_test_batches", "1.0"]
    main(["test", *every])
    main(["predict", "--trainer.limit_predict_batches", "1.0"])
    with (run / "predict/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = {int(row["index"]): -torch.tensor(float(row[f"p({row['target']})"])).log().item() for row in rows}
    worst = sorted(losses, key=lambda index: -losses[index])[:12]
    shown, captions = drawn["the highest losses: target → prediction"]
    assert [int(caption[1:].split()[0]) for caption in captions] == worst
    assert torch.equal(shown, images[worst])
    by_index = {int(row["index"]): f"{row['target']} → {row['prediction']}" for row in rows}
    assert [caption.splitlines()[1] for caption in captions] == [by_index[index] for index in worst]
    assert (run / "figures/test-worst_samples.png").stat().st_size > 5000


@pytest.mark.matrix
@pytest.mark.parametrize("recipe", ["regression", "lm"])
def test_ranks_find_the_same(recipe: str, work: Path, small_text: Path) -> None:
    """As text, which is not printed: pages belong into the report."""
    args = small_args(recipe, small_text)
    main_of(recipe)(["fit", *FIT, *args])
    run = Path(f"runs/{recipe}/default")
    names = sorted(path.stem for path in run.glob("texts/*.txt"))
    assert names == ["train-first_batch", *["val-samples"] * (recipe == "lm"), "val-worst_samples"]
    test, found = ["test", "--trainer.limit_test_batches", "1.0", "--data.eval_batch_size", "16"], []
    for world in (1, 2):
        more = ["--config", str(Path(__file__).parents[1] / "configs/strategy/ddp.yaml")] if world > 1 else []
        more += ["--trainer.accelerator", "cpu", "--trainer.devices", str(world)]
        assert run_ranks(main_of(recipe), [*test, *more], world=world, folder=work / "logs") == [0] * world, logs(
            work / "logs"
        )
        found.append((run / "texts/test-worst_samples.txt").read_text())
        assert "the highest losses" not in (work / "logs/rank0.log").read_text()
    assert found[0] == found[1]
    assert found[0].count("loss ") == 12


def test_the_report_says_what_was_run(work: Path) -> None:
    """The command without secrets, its duration, and the samples of each part."""
    main = main_of("regression")
    main(["fit", *FIT])
    run = Path("runs/regression/default")
    first = (run / "texts/train-first_batch.txt").read_text()
    main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "6"])
    assert (run / "texts/train-first_batch.txt").read_text() == first
    page = (run / "report.html").read_text()
    start = json.loads((run / "starts.jsonl").read_text().splitlines()[-1])
    assert start["parts"] == {"train": 308, "val": 45, "test": 89}
    for text in (
        "<th>command</th><td>", "train.py fit --ckpt_path last --trainer.max_steps 6</td>",
        "number 2 of the run, from step 4", "<th>first start</th><td>",
        "complete at step 6", "train 308, val 45, test 89", "<th>commit</th>",
        "train: first batch", "val: worst samples",
    ):  # fmt: skip
        assert text in page
    assert ("uncommitted" in start) == start["commit"].endswith("-dirty")
    assert ("uncommitted changes" in page) == ("uncommitted" in start)
