"""Batches of labelled samples, and their split into training, validation and test parts."""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
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

from common.checkpoint import check_made_by, keys_as_known, relabelled, surplus
from common.errors import InputError, nearest, speaking_of
from common.sources import Labelled, Source
from common.sources.files import Labels
from common.sources.images import Images, name_of
from common.sources.pixels import DECODING


class LabelledBatch(NamedTuple):
    """Samples as keyword arguments of the net, their classes and positions in the source, and a mask of real ones.

    ``target`` is that of :class:`common.sources.Labelled`.
    """

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
        raise InputError("model.augmentation is for images, and data.source has none; set it to null")
    return batch._replace(inputs={**batch.inputs, "pixel_values": augmentation(batch.inputs["pixel_values"])})


class LabelledDataset(Dataset[LabelledBatch]):
    """Reads the given positions of labelled samples as batches.

    Attributes:
        decodes: whether reading is work for a loader's workers.
    """

    def __init__(self, data: Labelled, positions: Int64[Tensor, " samples"]):
        self.data, self.positions = data, positions
        self.decodes = any(isinstance(values, Images) for values in data.inputs.values())

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
    """Split samples so that every part has the classes in the same proportion, and samples of equal keys go together.

    The source's own parts stay. Groups, and texts whose words have classes, are split without regard to classes. Of
    several labels the rarest that a sample has counts as its class. Windows of a text without a test part of their own
    are tested on the validation part.

    Args:
        data: the samples.
        val_fraction: share of all samples for validation, if the source has no validation split of its own.
        test_fraction: share of all samples for testing, if the source has no test split of its own.
        seed: seed of the split alone, so runs with other seeds test on the same samples.
        keys: of the samples, see :func:`keys_of`; all different if equal ones need not stay together.

    Raises:
        InputError: the shares leave nothing to train on, the seed is out of range, samples have no labels, or a class
            has fewer than 3.
    """
    if data.labels == "next token":
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
    if data.labels == "one":
        counts = torch.bincount(data.target, minlength=len(data.class_names))
        rare = int(counts.argmin())
        if counts[rare] < 3 and not (data.num_val and data.num_test):
            name = data.class_names[rare]
            raise InputError(f"data.source: class {name!r} has {counts[rare]} samples; a split needs at least 3")

    def split(positions: Tensor, fraction: float) -> Any:
        by = strata[positions] if data.groups is None else None
        try:
            return train_test_split(positions, test_size=fraction, stratify=by, random_state=seed)
        except ValueError as error:
            raise InputError(f"data.source: {len(positions)} samples cannot be split by class: {error}") from error

    ours = len(data.target) - data.num_val - data.num_test
    _, val, test = torch.arange(len(data.target)).split([ours, data.num_val, data.num_test])
    rest = one_of_each(keys[:ours])
    strata = _strata(data, rest, val_fraction, test_fraction)
    # What is drawn counts; samples of own parts count as so many of it.
    total = len(rest) if not (data.num_val or data.num_test) else len(data.target) * len(rest) / ours
    if not data.num_test:
        rest, test = split(rest, test_fraction * total / len(rest) if data.num_val else test_fraction)
    if not data.num_val:
        rest, val = split(rest, val_fraction * total / len(rest))
    drawn = [0, *[1] * (not data.num_val), *[2] * (not data.num_test)]
    parts = [rest, val, test]
    for number, part in zip(drawn, together([parts[number] for number in drawn], keys[:ours]), strict=True):
        parts[number] = part
    return Parts(*parts)


def differ_enough(data: Labelled, val_fraction: float, test_fraction: float, keys: Int64[Tensor, " samples"]) -> bool:
    """Whether samples of equal keys can stay together, and each part still has every class; says if they cannot."""
    if data.groups is not None or data.labels == "next token" or not data.class_names:
        return True
    rest = one_of_each(keys[: len(keys) - data.num_val - data.num_test])
    strata = _strata(data, rest, val_fraction, test_fraction)
    number = len(data.class_names) if data.labels == "one" else int(strata.max()) + 1
    of_each = torch.bincount(strata[rest], minlength=number)
    enough = bool(of_each.min() >= 3 and len(rest) * min(val_fraction, test_fraction) >= number)
    if not enough and len(one_of_each(keys)) < len(keys) and not rank_zero_only.rank:
        print("data.source: has too few different samples to keep equal ones in one part", flush=True)
    return enough


def _strata(data: Labelled, drawn: Tensor, val_fraction: float, test_fraction: float) -> Int64[Tensor, " samples"]:
    return strata_of(data, drawn, max(round(1 / min(val_fraction, test_fraction)), 3))


def strata_of(data: Labelled, drawn: Int64[Tensor, " drawn"], least: int) -> Int64[Tensor, " samples"]:
    """A number for each sample; the parts get equal shares of each number.

    It is the class. Of several labels it is the rarest that the sample has, or that it has none, if ``least`` of the
    samples to draw have the same. It is zero for texts whose words have classes.
    """
    if data.labels == "one":
        return data.target
    if data.labels == "words":
        return torch.zeros(len(data.target), dtype=torch.int64)
    rarest_first = data.target[:, torch.argsort(data.target[drawn].sum(0), stable=True)]
    strata = torch.where(rarest_first.any(1), rarest_first.argmax(1), rarest_first.shape[1])
    counts = torch.bincount(strata[drawn], minlength=rarest_first.shape[1] + 1)
    return torch.where(counts[strata] < least, counts.argmax(), strata).unique(return_inverse=True)[1]


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
    """A number for each sample: that of its group, or else by its inputs alone, so that equal samples have equal ones.

    Of texts the tokens count, not the padding, which hangs on the longest. Of images in files their bytes do.
    """
    if data.groups is not None:
        return data.groups
    if isinstance(images := data.inputs.get("pixel_values"), Images):
        return images.keys
    rows = {name: data.inputs[name].contiguous().numpy() for name in sorted(data.inputs)}
    mask = rows.pop("attention_mask", None)
    digests = bytearray()
    for number in range(len(data.target)):
        digest = hashlib.blake2b(digest_size=8)
        for values in rows.values():
            digest.update((values[number] if mask is None else values[number][mask[number] > 0]).tobytes())
        digests += digest.digest()
    return torch.frombuffer(digests, dtype=torch.int64)


def with_labels(keys: Int64[Tensor, " samples"], data: Labelled) -> Int64[Tensor, " samples"]:
    """A number for each sample by its key and its labels: what tells samples apart whose inputs are equal."""
    digests, target = bytearray(), data.target.reshape(len(keys), -1)
    for some, labels in zip(keys.split(4096), target.split(4096), strict=True):  # no second copy of wide labels
        for row in np.column_stack([some.numpy(), labels.numpy()]):
            content = (row[row != -100] if data.labels == "words" else row).tobytes()  # padding hangs on the longest
            if data.labels == "several":
                content = content.rstrip(b"\0")  # classes that came later
            digests += hashlib.blake2b(content, digest_size=8).digest()
    return torch.frombuffer(digests, dtype=torch.int64)


def sample_numbers(data: Labelled, inputs: Int64[Tensor, " samples"], equal_together: bool) -> dict[str, Tensor]:
    """Numbers by which a checkpoint knows samples again.

    Args:
        data: the samples.
        inputs: those of :func:`keys_of`, without groups.
        equal_together: whether samples of equal inputs are in one part.

    Returns:
        ``inputs``; ``labelled``, by inputs and labels; and ``keys``: by group, else ``inputs`` if equal samples are
        together, else ``labelled``. Of windows of a text, which are others when it grows, the keys alone.
    """
    if data.labels == "next token":
        return {"keys": inputs}
    labelled = with_labels(inputs, data)
    keys = data.groups if data.groups is not None else inputs if equal_together else labelled
    return {"keys": keys, "inputs": inputs, "labelled": labelled}


def as_known(data: Labelled, known: Sequence[str], may_grow: bool = False) -> Labelled:
    """The samples with the class numbers of a checkpoint, by its names.

    Args:
        data: the samples.
        known: names of the checkpoint's classes.
        may_grow: whether new classes come after all of these, which is said; not if one of these is gone.

    Raises:
        InputError: it does not know a class.
    """
    if not data.class_names or list(known) == data.class_names:
        return data
    new = [name for name in data.class_names if name not in known]
    if may_grow and new and len(data.class_names) == len(known) + len(new):
        known = [*known, *new]
        if not rank_zero_only.rank:
            names = shorten(", ".join(map(repr, new)), 80)
            print(f"data.source: classes that are new to the checkpoint come after its own: {names}", flush=True)
    for name in data.class_names:
        if name not in known:
            there = nearest(name, known) or f"; it knows {shorten(', '.join(known), 60)}"
            raise InputError(f"data.source: the checkpoint was not trained on a class {name!r}{there}")
    numbers = torch.tensor([*map(list(known).index, data.class_names)])
    if data.labels == "several":
        target = data.target.new_zeros(len(data.target), len(known)).index_copy_(1, numbers, data.target)
        return replace(data, target=target, class_names=list(known))
    target = torch.where(data.target < 0, data.target, numbers[data.target.clamp(min=0)])
    return replace(data, target=target, class_names=list(known))


def same_parts(
    keys: Int64[Tensor, " samples"],
    drawn: Parts,
    known: Mapping[str, Tensor],
    own: Collection[int] = (),
    equal_together: bool = True,
    emptied: Sequence[str] = (),
) -> Parts:
    """The parts, except that samples which a checkpoint knows keep their parts and order; says what came and went.

    Args:
        keys: of the samples; equal samples have equal ones.
        drawn: the parts of all samples; new ones stay there.
        known: ``parts`` of a checkpoint's facts: ``keys`` of training, validation and test in turn, and the ``sizes``.
        own: numbers of the parts that are the source's own, which are not drawn.
        equal_together: whether a new sample that equals a known one goes with it.
        emptied: names of the classes that no sample has.

    Raises:
        InputError: most of the checkpoint's samples gave way to others, or one of a source's own part is in another.
    """
    if keys[torch.cat(drawn)].equal(known["keys"]) and [len(part) for part in drawn] == known["sizes"].tolist():
        return drawn
    places: dict[int, list[int]] = {}  # of each known sample, by key; several are equal
    numbers = torch.arange(3).repeat_interleave(known["sizes"]).tolist()
    for key, part in zip(known["keys"].tolist(), numbers, strict=True):
        places.setdefault(key, []).append(part)
    key_of, new, moved = keys.tolist(), [0, 0, 0], 0
    found: list[dict[int, list[int]]] = [{}, {}, {}]  # positions by key, in each part
    for part, positions in enumerate(drawn):
        for position in positions.tolist():
            key = key_of[position]
            there = places.get(key, [])
            if not there:
                new[part] += 1
            goes = part if part in there or not there else there[0]
            if goes != part and (part in own or goes in own):
                moved += 1
            elif there and not (equal_together and len(there) == 1):
                there.remove(goes)
            found[goes].setdefault(key, []).append(position)
    missing = int((~torch.isin(known["keys"], keys)).sum())  # without an equal one
    if sum(new) and 2 * missing > len(known["keys"]):  # growing data lose none
        there = f"{missing} of the checkpoint's {len(known['keys'])} samples are gone, and {sum(new)} are new"
        problem = "they are others, or have changed"
        raise InputError(f"data.source: {there}: {problem}; give those of the training, or begin a new run")
    if moved:
        problem = f"{moved} samples that the checkpoint knows are in another part now"
        raise InputError(f"data.source: {problem}; put them back, or begin a new run")
    told = []
    if sum(new):
        shares = zip(new, ("training", "validation", "testing"), strict=True)
        where = ", ".join(f"{number} for {name}" for number, name in shares if number)
        told.append(f"{sum(new)} samples are new to the checkpoint, {where}")
    if gone := int(surplus(known["keys"], keys).sum()):
        left = f", and none of class {shorten(', '.join(map(repr, emptied)), 80)} is left" if emptied else ""
        told.append(f"{gone} of the checkpoint's {len(known['keys'])} samples are gone{left}")
    if told and not rank_zero_only.rank:
        changed = "; one that has changed counts as new" if len(told) > 1 else ""
        print(f"data.source: {'; '.join(told)}; all others stay{changed}", flush=True)
    parts = []
    for by_key, before in zip(found, known["keys"].split(known["sizes"].tolist()), strict=True):
        order = [by_key[key].pop(0) for key in before.tolist() if by_key.get(key)]
        parts.append(torch.tensor([*order, *(p for left in by_key.values() for p in left)], dtype=torch.int64))
    return Parts(*parts)


def parts_facts(numbers: Mapping[str, Int64[Tensor, " samples"]], parts: Parts) -> dict[str, Tensor]:
    """What :func:`same_parts` needs to know: the :func:`sample_numbers` in the order of the parts, and their sizes."""
    order = torch.cat(parts)
    known = {name: values[order] for name, values in numbers.items()}
    return {**known, "sizes": torch.tensor([len(part) for part in parts])}


def known_keys(
    numbers: Mapping[str, Tensor], known: Mapping[str, Tensor] | None, data: Labelled
) -> Int64[Tensor, " samples"]:
    """The keys by which a checkpoint knows samples; says how many have another label than it knows, and names one.

    Args:
        numbers: :func:`sample_numbers`.
        known: ``parts`` of the checkpoint's facts; None if there is none.
        data: the samples, with the class numbers of the checkpoint.
    """
    if known is None:
        return numbers["keys"]
    changed = relabelled(numbers, known)
    if changed.any() and not rank_zero_only.rank:
        first = int(changed.nonzero()[0])
        name = f"sample {first}"
        if isinstance(images := data.inputs.get("pixel_values"), Images):
            name = name_of(images.table[first][images.column], first)
        if data.labels == "one":
            inputs = numbers["inputs"][first].repeat(len(data.class_names))
            of_each = with_labels(inputs, replace(data, target=torch.arange(len(data.class_names)), groups=None))
            gone = known["labelled"][surplus(known["labelled"], numbers["labelled"])]
            was = torch.isin(of_each, gone).nonzero()[:1, 0].tolist()
            before = "".join(f", {data.class_names[number]!r} before" for number in was)
            name += f" ({data.class_names[int(data.target[first])]!r} now{before})"
        told = f"{int(changed.sum())} samples have another label than the checkpoint knows, such as {name}"
        print(f"data.source: {told}; the present ones count, and all stay in their parts", flush=True)
    return keys_as_known(changed, numbers, known)


def drawn_parts(
    data: Labelled,
    split: tuple[float, float, int],
    alike: Int64[Tensor, " samples"],
    keys: Int64[Tensor, " samples"],
    known: Mapping[str, Tensor] | None,
) -> Parts:
    """The parts of :func:`split_by_class`; all samples for training where a checkpoint has parts for each of them.

    Then a class may be too rare to draw.

    Args:
        data: the samples.
        split: shares for validation and testing, and the seed.
        alike: equal for samples that go together.
        keys: those of :func:`known_keys`.
        known: ``parts`` of the checkpoint's facts; None if there is none.
    """
    fewer = known is not None and not (data.num_val or data.num_test) and len(keys) < len(known["keys"])
    if known is not None and fewer and torch.isin(keys, known["keys"]).all():
        every = torch.arange(len(keys))
        return Parts(every, every[:0], every[:0])
    return split_by_class(data, *split, alike)


def classes_without(data: Labelled) -> list[str]:
    """Names of the classes that no sample has."""
    if data.labels == "several":
        there = data.target.any(0)
    else:
        there = torch.bincount(data.target[data.target >= 0], minlength=len(data.class_names)) > 0
    return [name for name, has in zip(data.class_names, there.tolist(), strict=True) if not has]


def tell_changed(now: Mapping[str, Tensor], known: Mapping[str, Tensor]) -> None:
    """Say that a text has other windows than a checkpoint knows; both are of :func:`parts_facts`."""
    if now["keys"].equal(known["keys"]) or rank_zero_only.rank:
        return
    sizes = zip(("training", "validation"), now["sizes"].tolist(), known["sizes"].tolist(), strict=False)
    counts = ", ".join(f"{size} for {part} ({before} before)" for part, size, before in sizes)
    print(f"data.source: the text has changed since the checkpoint; windows: {counts}", flush=True)


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
        takes: what the recipe can learn: what has a class.
        may_grow: whether classes that are new to the checkpoint come after its own.

    Attributes:
        facts: what they are ``made_by``, the arguments of the split; ``class_names`` and ``labels``, what has a class;
            of inputs the ``shapes`` and, if they are images, the ``range`` of values; of texts the ``tokenizer``;
            ``by_file``, whether images are known by their files; ``equal_together``, whether equal samples are in one
            part; and ``parts``, with the samples' ``keys`` (those of training, validation and test in turn) and the
            ``sizes`` of the three.

    Raises:
        InputError: those of the source and of :func:`split_by_class`; the checkpoint does not know a class, or has
            taken other inputs.
    """

    def __init__(
        self,
        source: Source,
        val_fraction: float,
        test_fraction: float,
        seed: int,
        known: Mapping[str, Any],
        takes: Collection[Labels] = ("one", "next token"),
        may_grow: bool = False,
    ):
        if known and "shapes" not in known:
            raise InputError("data.facts_of: the checkpoint was not trained on such samples; name another, or null")
        made_by = {
            "val_fraction": val_fraction, "test_fraction": test_fraction, "split_seed": seed,
            "source.split": source.split, "source.group": source.group,
        }  # fmt: skip
        check_made_by(known, made_by)
        self._source, self._split, self._takes = source, (val_fraction, test_fraction, seed), takes
        self.facts: dict[str, Any] = {**known, "made_by": made_by}
        self._may_grow = may_grow
        if not known or may_grow:
            self._read  # noqa: B018

    @cached_property
    def _read(self) -> tuple[Labelled, Parts]:
        known = self.facts.get("parts")
        if known is not None:
            self._source.take_over(self.facts)
        data = self._source.read()
        if data.labels not in self._takes:
            there = {"several": "several labels per sample", "words": "a label per word"}.get(data.labels, data.labels)
            raise InputError(f"data.source: has {there}, which this recipe does not take; recipes/classification does")
        images = data.inputs.get("pixel_values")
        by_file = isinstance(images, Images)
        inputs = keys_of(replace(data, groups=None))
        if known is None:
            self.facts |= {
                "class_names": [str(name) for name in data.class_names],
                "labels": data.labels,
                "shapes": _shapes(data),
                "range": _range(data),
                "tokenizer": dict(data.tokenizer),
                "by_file": by_file,
            }
        else:
            self._check_alike(data)
            if data.groups is None and by_file and not self.facts.get("by_file"):
                problem = "the checkpoint knows its images by their pixels, and does not know these files"
                raise InputError(f"data.source: {problem}; it is of an earlier version or other data; begin a new run")
            if data.class_names and data.labels != (before := self.facts.get("labels", data.labels)):
                problem = f"the labels are of kind {data.labels!r}, and those of the training {before!r}"
                raise InputError(f"data.source.label: {problem}; give the same kind")
            data = as_known(data, self.facts["class_names"], self._may_grow)
            self.facts["class_names"] = [*map(str, data.class_names)] or self.facts["class_names"]
        if isinstance(images, Images):
            if known is not None and images.num_special and self.facts.get("decoding", {}).get("version") != DECODING:
                problem = f"{images.num_special:,} images are transparent, of more than 8 bits or have a profile"
                seen = "and an earlier version, which made the checkpoint, gave them other pixels"
                raise InputError(f"data.source: {problem}, {seen}; begin a new run")
            self.facts["decoding"] = {"version": DECODING, "levels": images.levels}
        together = self.facts.setdefault("equal_together", known is not None or self._can_be_together(data, inputs))
        numbers = sample_numbers(data, inputs, together)
        alike = numbers["keys"] if together else torch.arange(len(inputs))
        if known is None or data.labels == "next token":
            parts = split_by_class(data, *self._split, alike)
            if known is None:
                _check_own_parts(data, numbers["keys"], parts)
            else:  # windows of a text are others when it grows
                tell_changed(parts_facts(numbers, parts), known)
        else:
            keys = known_keys(numbers, known, data)
            drawn = drawn_parts(data, self._split, alike, keys, known)
            own = [*[1] * (data.num_val > 0), *[2] * (data.num_test > 0)]
            parts = same_parts(keys, drawn, known, own, together, classes_without(data))
        self.facts["parts"] = parts_facts(numbers, parts)
        return data, parts

    def _can_be_together(self, data: Labelled, keys: Int64[Tensor, " samples"]) -> bool:
        val_fraction, test_fraction, seed = self._split
        check_split(val_fraction, test_fraction, seed)
        return differ_enough(data, val_fraction, test_fraction, keys)

    @property
    def labelled(self) -> Labelled:
        """All samples."""
        return self._read[0]

    @property
    def parts(self) -> Parts:
        """Their positions in each part."""
        return self._read[1]

    def datasets(self) -> Iterator[LabelledDataset]:
        """Data sets of the three parts; that for testing is that for validation where there is no other."""
        train, val = (LabelledDataset(self.labelled, part) for part in self.parts[:2])
        test = val if self.parts.test is self.parts.val else LabelledDataset(self.labelled, self.parts.test)
        return iter((train, val, test))

    def for_predict(
        self, source: Source | None, keep: Sequence[str] | None
    ) -> tuple[LabelledDataset, dict[str, list[Any]]]:
        """The samples to predict, and columns of their source.

        Args:
            source: other samples than the test part.
            keep: names of the columns.

        Raises:
            InputError: those of :meth:`to_predict` and of :meth:`common.sources.Source.columns`.
        """
        if source is None:
            return LabelledDataset(self.labelled, self.parts.test), self._source.columns(keep) if keep else {}
        with speaking_of("data.predict_source", instead_of="data.source"):
            kept = source.columns(keep) if keep else {}
        return self.to_predict(source), kept

    def to_predict(self, source: Any) -> LabelledDataset:
        """A data set of other samples, whose labels are not looked at.

        Raises:
            InputError: those of the source, or the net would take the samples otherwise than those of its training.
        """
        with speaking_of("data.predict_source", instead_of="data.source"):
            source.take_over(self.facts)
            given = source.read()
            self._check_alike(given)
        given = replace(given, target=given.target.clamp(max=-1))  # -100 stays
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
        key, length, before = "max_length", now.get("model_max_length"), then.get("model_max_length")
        if given.labels == "next token":  # its tokenizer may have a length of its own
            key, (length,), (before,) = "context", shapes["input_ids"], trained["input_ids"]
        if length != before:
            raise InputError(f"data.source.{key}: is {length}, and that of the training {before}; take that")


def _check_own_parts(data: Labelled, keys: Tensor, parts: Parts) -> None:
    """Refuse groups that lie in several of the source's own parts; say how many equal samples do."""
    if data.labels == "next token" or not (data.num_val or data.num_test):
        return
    equal = int(torch.isin(keys[torch.cat(parts[1:])], keys[parts.train]).sum())
    if equal and data.groups is not None:
        problem = f"{equal} samples of validation and test have a group of the training samples"
        raise InputError(f"data.source.group: {problem}; leave it out, or the split of its own")
    if equal and not rank_zero_only.rank:
        print(f"data.source: {equal} samples of its validation and test parts equal a training sample", flush=True)


def _shapes(data: Labelled) -> dict[str, list[int]]:
    return {name: list(data.inputs[name].shape[1:]) for name in sorted(data.inputs)}


def _range(data: Labelled) -> list[float]:
    """The smallest and the largest value of images; nothing if there are none."""
    images = data.inputs.get("pixel_values")
    if isinstance(images, Images):
        return [*images.range]
    return [] if images is None else [images.min().item(), images.max().item()]


def fingerprint(data: Labelled) -> str:
    """A hash of the samples, their classes and the class names."""
    shape = [sorted(data.inputs), data.class_names, data.num_val, data.num_test, data.groups is not None]
    digest = hashlib.blake2b(repr(shape).encode(), digest_size=16)
    if data.groups is not None:
        digest.update(data.groups.numpy().data)
    for values in (*(data.inputs[name] for name in sorted(data.inputs)), data.target):
        held = values.keys if isinstance(values, Images) else values
        digest.update(repr((values.shape, held.dtype)).encode())
        digest.update(held.contiguous().numpy().data)
    return digest.hexdigest()
