"""Batches of labelled samples, and their split into training, validation and test parts."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64
from lightning.fabric.utilities.rank_zero import rank_zero_only
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import Dataset

from common.checkpoint import check_made_by
from common.errors import InputError, nearest, speaking_of
from common.sources import Labelled, Source


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


def split_by_class(
    data: Labelled, val_fraction: float, test_fraction: float, seed: int, keys: Int64[Tensor, " samples"]
) -> Parts:
    """Split samples so that every part has the classes in the same proportion, and equal samples go together.

    If the source has its own validation split, its splits and order stay; without a test split of its own, the
    validation part also tests.

    Args:
        data: the samples; the source's own test split stays the test part.
        val_fraction: share of all samples for validation.
        test_fraction: share of all samples for testing, if the source has no test split of its own.
        seed: seed of the split alone, so runs with other seeds test on the same samples.
        keys: of the samples, see :func:`keys_of`.

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

    own_test = data.num_test
    samples, test = torch.arange(len(data.target)).tensor_split([len(data.target) - own_test])
    rest = one_of_each(keys[samples])
    count = len(rest) + own_test
    if not own_test:
        rest, test = split(rest, test_fraction)
    train, val = split(rest, val_fraction * count / len(rest))
    if own_test:
        train, val = together([train, val], keys[samples])
    else:
        train, val, test = together([train, val, test], keys)
    return Parts(train, val, test)


def one_of_each(keys: Int64[Tensor, " samples"]) -> Int64[Tensor, " different"]:
    """Positions of the first of all samples with equal keys, in their order."""
    return torch.from_numpy(np.sort(np.unique(keys.numpy(), return_index=True)[1]))


def together(parts: Sequence[Tensor], keys: Int64[Tensor, " samples"]) -> list[Tensor]:
    """The parts, each with the samples whose equals are in it.

    Args:
        parts: positions of one sample of each key.
        keys: of all samples.
    """
    drawn = torch.cat([*parts])
    number = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(part) for part in parts]))
    known, order = keys[drawn].sort()
    again = torch.ones(len(keys), dtype=torch.bool).index_fill_(0, drawn, False).nonzero()[:, 0]
    its = number[order[torch.searchsorted(known, keys[again])]]
    return [torch.cat([part, again[its == n]]) for n, part in enumerate(parts)]


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


def _as_known(data: Labelled, known: Sequence[str]) -> Labelled:
    if not data.class_names or list(known) == data.class_names:
        return data
    for name in data.class_names:
        if name not in known:
            there = nearest(name, known) or f"; it knows {shorten(', '.join(known), 60)}"
            raise InputError(f"data.source: the checkpoint was not trained on a class {name!r}{there}")
    numbers = torch.tensor([*map(list(known).index, data.class_names)])
    target = torch.where(data.target < 0, data.target, numbers[data.target.clamp(min=0)])
    return replace(data, target=target, class_names=list(known))


def same_parts(
    keys: Int64[Tensor, " samples"],
    drawn: Parts,
    known: Mapping[str, Tensor],
    equal_together: bool = True,
    own_test: bool = False,
    fixed: bool = False,
) -> Parts:
    """The parts, except that samples which a checkpoint knows keep their parts; says how many are new.

    Args:
        keys: of the samples; equal samples have equal ones.
        drawn: the parts that are drawn for all samples; new ones stay there.
        known: ``parts`` of a checkpoint's facts: ``keys`` of training, validation and test in turn, and the ``sizes``.
        equal_together: whether a new sample that equals a known one goes with it.
        own_test: whether the test part is the source's own; it stays.
        fixed: whether all parts are the user's own.

    Raises:
        InputError: the checkpoint knows none of the samples, or the user has moved one to another part.
    """
    if keys[torch.cat(drawn)].equal(known["keys"]):
        return drawn
    numbers = torch.arange(3).repeat_interleave(known["sizes"]).tolist()
    parts_of: dict[int, list[int]] = {}
    for key, part in zip(known["keys"].tolist(), numbers, strict=True):
        parts_of.setdefault(key, []).append(part)
    key_of, chosen, new = keys.tolist(), ([], [], []), [0, 0, 0]
    for part, positions in enumerate(drawn):
        for position in positions.tolist():
            there = parts_of.get(key_of[position], [])
            new[part] += not there
            before = part
            if there:
                before = there[0] if equal_together and len(there) == 1 else there.pop(0)
            stays = own_test and 2 in (part, before)
            chosen[part if stays else before].append(position)
    if sum(new) == len(keys):
        problem = f"the checkpoint knows none of the {len(keys)} samples: they are others, or have changed"
        raise InputError(f"data.source: {problem}; give those of the training, or fit without --ckpt_path")
    parts = Parts(*(torch.tensor(positions, dtype=torch.int64) for positions in chosen))
    ours, theirs = ([sorted(keys[part].tolist()) for part in each] for each in (parts, drawn))
    if fixed and ours != theirs:
        problem = "samples that the checkpoint knows are in another part now"
        raise InputError(f"data.source: {problem}; put them back, or fit without --ckpt_path")
    if sum(new) and not rank_zero_only.rank:
        shares = "{} for training, {} for validation, {} for testing".format(*new)
        print(f"data.source: {sum(new)} samples are new to the checkpoint, {shares}; all others stay", flush=True)
    return parts


def parts_facts(keys: Int64[Tensor, " samples"], parts: Parts) -> dict[str, Tensor]:
    """What :func:`same_parts` needs to know."""
    return {"keys": keys[torch.cat(parts)], "sizes": torch.tensor([len(part) for part in parts])}


class Samples:
    """Samples of a source in three parts, for training, validation and testing.

    What a checkpoint has learnt of its data holds: class numbers go by its names, and samples stay in their parts. Its
    run's source is read when its samples are asked for: ``export``, and ``predict`` of other samples, need none.

    Args:
        source: the samples; a test or validation part of its own stays.
        val_fraction: see :func:`split_by_class`.
        test_fraction: the same.
        seed: the same.
        known: facts of the checkpoint, see :class:`common.data.BaseDataModule`; empty if there is none.

    Attributes:
        facts: what they are ``made_by``, the arguments of the split; ``class_names``; of inputs the ``shapes`` and, if
            they are images, the ``range`` of values; of texts the ``tokenizer``; and ``parts``, with the samples'
            ``keys`` (those of training, validation and test in turn) and the ``sizes`` of the three.

    Raises:
        InputError: those of the source and of :func:`split_by_class`; the checkpoint does not know a class, or has
            taken other inputs.
    """

    def __init__(self, source: Source, val_fraction: float, test_fraction: float, seed: int, known: Mapping[str, Any]):
        if known and "shapes" not in known:
            raise InputError("data.facts_of: the checkpoint was not trained on such samples; name another, or null")
        made_by = {"val_fraction": val_fraction, "test_fraction": test_fraction, "split_seed": seed}
        check_made_by(known, **made_by)
        self._source, self._split = source, (val_fraction, test_fraction, seed)
        self.facts: dict[str, Any] = {**known, "made_by": made_by}
        if not known:
            self._read  # noqa: B018

    @cached_property
    def _read(self) -> tuple[Labelled, Parts]:
        data = self._source.read()
        keys = keys_of(data) if data.groups is None else data.groups
        parts = split_by_class(data, *self._split, keys)
        if "parts" in self.facts:
            self._check_alike(data)
            own = data.num_val > 0
            if not own or data.target.ndim == 1:  # windows of a text are others when it grows
                known = self.facts["parts"]
                parts = same_parts(keys, parts, known, own_test=data.num_test > 0 and not own, fixed=own)
            data = _as_known(data, self.facts["class_names"])
        images = data.inputs.get("pixel_values")
        self.facts |= {
            "class_names": data.class_names,
            "shapes": _shapes(data),
            "range": [] if images is None else [images.min().item(), images.max().item()],
            "tokenizer": dict(data.tokenizer),
            "parts": parts_facts(keys, parts),
        }
        return data, parts

    @property
    def labelled(self) -> Labelled:
        """All samples."""
        return self._read[0]

    @property
    def parts(self) -> Parts:
        """Their positions in each part."""
        return self._read[1]

    def datasets(self) -> Iterator[LabelledDataset]:
        """Data sets of the three parts."""
        return (LabelledDataset(self.labelled, part) for part in self.parts)

    def to_predict(self, source: Source) -> LabelledDataset:
        """A data set of other samples, whose labels are not looked at.

        Raises:
            InputError: those of the source, or the net would take the samples otherwise than those of its training.
        """
        with speaking_of("data.predict_source", instead_of="data.source"):
            given = source.read()
            self._check_alike(given)
        given = replace(given, target=torch.full_like(given.target, -1))
        return LabelledDataset(given, torch.arange(len(given.target)))

    def _check_alike(self, given: Labelled) -> None:
        trained, shapes = self.facts["shapes"], _shapes(given)
        if shapes.keys() != trained.keys():
            kinds = (", ".join(each) for each in (shapes, trained))
            raise InputError("data.source: gives {}, and that of the training {}; take the same kind".format(*kinds))
        sizes = ["x".join(map(str, each["pixel_values"])) for each in (shapes, trained) if "pixel_values" in each]
        if len(set(sizes)) > 1:
            problem = "images are {}, and those of the training {} (channels x height x width)".format(*sizes)
            raise InputError(f"data.source: {problem}; set its size and mode")
        now, then = given.tokenizer, self.facts["tokenizer"]
        if now.get("json") != then.get("json"):
            problem = "is not that of the training; one that is made from a text changes with it"
            raise InputError(f"data.source.tokenizer: {problem}; give the same")
        if (length := now.get("model_max_length")) != (before := then.get("model_max_length")):
            raise InputError(f"data.source.max_length: is {length}, and that of the training {before}; take that")


def _shapes(data: Labelled) -> dict[str, list[int]]:
    return {name: list(data.inputs[name].shape[1:]) for name in sorted(data.inputs)}


def fingerprint(data: Labelled) -> str:
    """A hash of the samples, their classes and the class names."""
    digest = hashlib.blake2b(repr([sorted(data.inputs), data.class_names]).encode(), digest_size=16)
    for values in (*(data.inputs[name] for name in sorted(data.inputs)), data.target):
        digest.update(repr((values.shape, values.dtype)).encode())
        digest.update(values.contiguous().numpy().data)
    return digest.hexdigest()
