"""Pairs of overlaid images with several tasks each. Edit this file for your own samples and tasks."""

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from common.checkpoint import read_facts
from common.data import BaseDataModule, step_seed
from common.errors import InputError
from common.sources import Source
from common.sources.labelled import Samples

from .pairs import draw_pairs
from .tasks import Task, TaskBatch, TaskDataset, choose

Batch = TaskBatch


class MultiTaskData(BaseDataModule):
    """Pairs of images, one left and one right: their classes, and the offset between them.

    Tasks: ``left`` and ``right`` are the classes of the two images; ``offset`` leads from the left to the right image,
    in pixels down and to the right. No two parts share an image.

    Args:
        source: the single images, by class path: one of ``common.sources``.
        tasks: names of the tasks to train, in this order.
        canvas: height and width of the pictures, in pixels.
        max_shift: largest distance of an image from its side of the canvas, in pixels.
        pairs: number of pairs for training, validation and testing.
        val_fraction: share of the single images for validation.
        test_fraction: share of the single images for testing, if the source has no test split of its own.
        split_seed: seed of split and pairs alone, so runs with other seeds test on the same pairs.
        facts_of: a checkpoint whose class numbers and parts hold; that of ``--ckpt_path`` if there is one.
        batch_size: pairs per rank and micro-batch.
        eval_batch_size: the same in evaluation.
        num_workers: reading processes.
    """

    def __init__(
        self,
        source: Source,
        tasks: list[str] = ["left", "right", "offset"],  # noqa: B006
        canvas: int = 14,
        max_shift: int = 2,
        pairs: tuple[int, int, int] = (8000, 2000, 2000),
        val_fraction: float = 0.15,
        test_fraction: float = 0.25,
        split_seed: int = 0,
        facts_of: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
    ):
        super().__init__(batch_size, eval_batch_size, num_workers)
        if min(pairs) < 1:
            raise InputError(f"data.pairs must be at least 1 for training, validation and testing, got {list(pairs)}")
        self.samples = Samples(source, val_fraction, test_fraction, split_seed, read_facts(facts_of))
        self.facts: dict[str, Any] = self.samples.facts
        if "pixel_values" not in self.facts["shapes"]:
            raise InputError(f"data.source: {type(source).__name__} has no images; take one that has")
        _, height, width = self.facts["shapes"]["pixel_values"]
        smallest = max(height, width + 2 * max_shift + 1)
        if max_shift < 0:
            raise InputError(f"data.max_shift must be at least 0, got {max_shift}")
        if canvas < smallest:
            place = f"no place for two images of {width} pixels with data.max_shift {max_shift}"
            raise InputError(f"data.canvas: {canvas} has {place}; take at least {smallest}")
        self.canvas, self.max_shift, self.pairs, self.split_seed = canvas, max_shift, pairs, split_seed
        classes = len(self.facts["class_names"])
        known: list[Task] = [
            {"name": "left", "kind": "classification", "width": classes},
            {"name": "right", "kind": "classification", "width": classes},
            {"name": "offset", "kind": "regression", "width": 2},
        ]
        self.chosen = choose(known, tasks)
        names = {task["name"]: self.facts["class_names"] for task in self.chosen if task["name"] in ("left", "right")}
        self.facts |= {"tasks": self.chosen, "task_classes": names, "canvas": canvas}

    @override
    def setup(self, stage: str) -> None:
        self.train_data, self.val_data, self.test_data = (self._make(part) for part in range(3))
        self.predict_data = self.test_data

    def _make(self, part: int) -> TaskDataset:
        labelled, seed = self.samples.labelled, step_seed(self.split_seed, part)
        images, positions = labelled.inputs["pixel_values"], self.samples.parts[part]
        made = draw_pairs(images, positions, self.pairs[part], self.canvas, self.max_shift, seed)
        left, right = labelled.target[made.chosen]
        target = {"left": left, "right": right, "offset": (made.corner[1] - made.corner[0]).float()}
        chosen = {task["name"]: target[task["name"]] for task in self.chosen}
        decodes = not isinstance(images, Tensor)  # else all pairs are in memory too
        pictures = made if decodes else made[torch.arange(len(made))]
        return TaskDataset({"pixel_values": pictures}, chosen, self.chosen, decodes)
