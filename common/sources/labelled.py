"""Batches of labelled samples, and their split into training, validation and test parts."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int64
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import Dataset

from common.errors import InputError, nearest
from common.sources import Labelled


class LabelledBatch(NamedTuple):
    """Samples as keyword arguments of the net, their classes and positions in the source, and a mask of real ones."""

    inputs: Mapping[str, Tensor]
    target: Int64[Tensor, "batch *positions"]
    index: Int64[Tensor, " batch"]
    mask: Bool[Tensor, " batch"]


def augmented(batch: LabelledBatch, augmentation: nn.Sequential) -> LabelledBatch:
    """The batch with its images augmented; the batch itself if there is no augmentation.

    Raises:
        InputError: there are no images to augment.
    """
    if not len(augmentation):
        return batch
    if "pixel_values" not in batch.inputs:
        raise InputError("model.augmentation is for images, and data.source has texts; set it to null")
    return batch._replace(inputs={**batch.inputs, "pixel_values": augmentation(batch.inputs["pixel_values"])})


def as_known(data: Labelled, known: Sequence[str] | None) -> Labelled:
    """The samples with the class numbers of a checkpoint, which go by the names.

    Args:
        data: the samples.
        known: the class names of the checkpoint; None if there is none.

    Raises:
        InputError: the checkpoint does not know a class, or its classes are the tokens of another tokenizer.
    """
    if known is None or not data.class_names or list(known) == data.class_names:
        return data
    if data.target.ndim > 1:
        problem = "the tokenizer was made anew, as the text or its settings are not the checkpoint's"
        raise InputError(f"data.source: {problem}; give the same text")
    for name in data.class_names:
        if name not in known:
            there = nearest(name, known) or f"; it knows {shorten(', '.join(known), 60)}"
            raise InputError(f"data.source: the checkpoint was not trained on a class {name!r}{there}")
    numbers = torch.tensor([*map(list(known).index, data.class_names)])
    target = torch.where(data.target < 0, data.target, numbers[data.target.clamp(min=0)])
    return replace(data, target=target, class_names=list(known))


def check_alike(given: Labelled, trained: Labelled) -> None:
    """Refuse samples to predict that the net would take otherwise than those of its training.

    Raises:
        InputError: they are of another kind, or images of another size or mode.
    """
    if given.inputs.keys() != trained.inputs.keys():
        kinds = (", ".join(sorted(data.inputs)) for data in (given, trained))
        raise InputError("data.source: gives {}, and that of the training {}; take the same kind".format(*kinds))
    shapes = [
        "x".join(map(str, d.inputs["pixel_values"].shape[1:])) for d in (given, trained) if "pixel_values" in d.inputs
    ]
    if len(set(shapes)) > 1:
        problem = "images are {}, and those of the training {} (channels x height x width)".format(*shapes)
        raise InputError(f"data.source: {problem}; set its size and mode")


class LabelledDataset(Dataset[LabelledBatch]):
    """Reads the given positions of labelled samples as batches."""

    def __init__(self, data: Labelled, positions: Int64[Tensor, " samples"]):
        self.data, self.positions = data, positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, indices: Sequence[int]) -> LabelledBatch:
        chosen = self.positions[indices]
        inputs = {name: values[chosen] for name, values in self.data.inputs.items()}
        return LabelledBatch(inputs, self.data.target[chosen], chosen, torch.ones(len(indices), dtype=torch.bool))


class Parts(NamedTuple):
    """Positions of the samples of each part."""

    train: Int64[Tensor, " train"]
    val: Int64[Tensor, " val"]
    test: Int64[Tensor, " test"]


def check_split(val_fraction: float, test_fraction: float, seed: int) -> None:
    """Refuse shares and a seed that fit no data.

    Raises:
        InputError: the shares leave nothing to train on, or the seed is out of range.
    """
    for key, share in {"val_fraction": val_fraction, "test_fraction": test_fraction}.items():
        if not 0 < share < 1:
            raise InputError(f"data.{key} must be above 0 and below 1, got {share}")
    if val_fraction + test_fraction >= 1:
        shares = f"data.val_fraction {val_fraction} and data.test_fraction {test_fraction}"
        raise InputError(f"{shares} must leave samples to train on")
    if not 0 <= seed < 2**32:
        raise InputError(f"data.split_seed must be in [0, 2**32), got {seed}")


def split_by_class(data: Labelled, val_fraction: float, test_fraction: float, seed: int) -> Parts:
    """Split samples so that every part has the classes in the same proportion.

    If the source has its own validation split, its splits and order stay; without a test split of its own, the
    validation part also tests.

    Args:
        data: the samples; the source's own test split stays the test part.
        val_fraction: share of all samples for validation.
        test_fraction: share of all samples for testing, if the source has no test split of its own.
        seed: seed of the split alone, so runs with other seeds test on the same samples.

    Raises:
        InputError: the shares leave nothing to train on, the seed is out of range, samples have no labels, or a class
            has fewer than 3.
    """
    if data.num_val:
        train, val, test = torch.arange(len(data.target)).split(
            [len(data.target) - data.num_val - data.num_test, data.num_val, data.num_test]
        )
        return Parts(train, val, test if data.num_test else val)
    check_split(val_fraction, test_fraction, seed)
    if not data.class_names:
        raise InputError("data.source.label is null, but training needs labels; name their column")
    if len(data.class_names) < 2:
        raise InputError(
            f"data.source.label: {data.class_names[0]!r} is the only class; there is nothing to tell apart"
        )
    counts = torch.bincount(data.target, minlength=len(data.class_names))
    rare = int(counts.argmin())
    if counts[rare] < 3:
        name = data.class_names[rare]
        raise InputError(f"data.source: class {name!r} has {counts[rare]} samples; a split needs at least 3")

    def split(positions: Tensor, fraction: float) -> Any:
        try:
            return train_test_split(positions, test_size=fraction, stratify=data.target[positions], random_state=seed)
        except ValueError as error:
            raise InputError(f"data.source: {len(positions)} samples cannot be split by class: {error}") from error

    rest, test = torch.arange(len(data.target)).tensor_split([len(data.target) - data.num_test])
    if not data.num_test:
        rest, test = split(rest, test_fraction)
    train, val = split(rest, val_fraction * len(data.target) / len(rest))
    return Parts(train, val, test)


def keys_of(data: Labelled) -> Int64[Tensor, " samples"]:
    """A number for each sample, by its inputs alone: equal samples have equal ones."""
    generator, keys = torch.Generator().manual_seed(0), torch.zeros(len(data.target), dtype=torch.int64)
    for name in sorted(data.inputs):
        values = data.inputs[name].flatten(1)
        width = -(-values.shape[1] * values.element_size() // 8)
        factors = torch.randint(-(2**62), 2**62, (width,), generator=generator)
        for place in range(0, len(values), 4096):  # in pieces, to hold little more than the samples
            rows = values[place : place + 4096].contiguous().view(torch.uint8)
            rows = nn.functional.pad(rows, (0, 8 * width - rows.shape[1])).view(torch.int64)
            keys[place : place + 4096] += (rows * factors).sum(1)  # it wraps
    return keys


def as_learnt(data: Labelled, drawn: Parts, known: Mapping[str, Any]) -> tuple[Labelled, Parts, dict[str, Any]]:
    """What a checkpoint has learnt of its data holds: class numbers go by names, and samples stay in their parts.

    Args:
        data: the samples; a test or validation part of the source's own stays.
        drawn: the parts that are drawn for all samples; new ones go there.
        known: facts of the checkpoint, see :class:`common.data.BaseDataModule`; empty if there is none.

    Returns:
        The samples, their parts, and the facts for the checkpoints of this run: ``class_names``, and ``parts`` with the
        samples' ``keys`` (those of training, validation and test in turn) and the ``sizes`` of the three.

    Raises:
        InputError: the checkpoint does not know a class, or has another tokenizer.
    """
    keys = keys_of(data)
    parts = _same_parts(data, keys, drawn, known.get("parts"))
    data = as_known(data, known.get("class_names"))
    sizes = torch.tensor([len(part) for part in parts])
    return data, parts, {"class_names": data.class_names, "parts": {"keys": keys[torch.cat(parts)], "sizes": sizes}}


def _same_parts(data: Labelled, keys: Tensor, drawn: Parts, known: Mapping[str, Tensor] | None) -> Parts:
    if known is None or data.num_val or keys[torch.cat(drawn)].equal(known["keys"]):
        return drawn
    numbers = torch.arange(3).repeat_interleave(known["sizes"]).tolist()
    # Of equal samples in several parts all go to training: none of them may test.
    part_of = dict(sorted(zip(known["keys"].tolist(), numbers, strict=True), key=lambda item: -item[1]))
    key_of, chosen = keys.tolist(), ([], [], [])
    for part, positions in enumerate(drawn):
        for position in positions.tolist():
            before = part_of.get(key_of[position], part)
            stays = data.num_test and 2 in (part, before)  # the source's own test part
            chosen[part if stays else before].append(position)
    return Parts(*(torch.tensor(positions, dtype=torch.int64) for positions in chosen))


def fingerprint(data: Labelled) -> str:
    """A hash of the samples, their classes and the class names."""
    digest = hashlib.blake2b(repr([sorted(data.inputs), data.class_names]).encode(), digest_size=16)
    for values in (*(data.inputs[name] for name in sorted(data.inputs)), data.target):
        digest.update(repr((values.shape, values.dtype)).encode())
        digest.update(values.contiguous().numpy().data)
    return digest.hexdigest()
