"""Entities in tagged words, and how many of them a net finds.

The tags are those of the BIO scheme (Ramshaw and Marcus, https://aclanthology.org/W95-0107): the first word of an
entity has ``B-type``, the others have ``I-type``, and words outside of entities have ``O``.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torchmetrics import Metric


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Type, first word and the word after the last of each entity.

    An ``I-`` that goes on nothing of its type begins an entity, as in CoNLL's script and in the default of seqeval.
    """
    found, begin, before = set(), 0, "O"
    for place, tag in enumerate([*tags, "O"]):
        goes_on = tag[0] == "I" and before != "O" and before[2:] == tag[2:]
        if before != "O" and not goes_on:
            found.add((before[2:], begin, place))
        if not goes_on:
            begin = place
        before = tag
    return found


def types_of(names: Sequence[str]) -> list[str]:
    """Types of the entities that tags name, sorted."""
    return sorted({name[2:] for name in names if name != "O"})


def precision_recall_f1(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of counts found and right, found, and there, on the last axis; 0 where a denominator is."""
    right, found, there = counts.float().unbind(-1)
    return right / found.clamp(min=1), right / there.clamp(min=1), 2 * right / (found + there).clamp(min=1)


class EntityCounts(Metric):
    """Entities of each type that are found and right, found, and there; words that are tagged right, and all words.

    An entity is right if its type and all its words are.

    Args:
        names: of the tags, by number.
    """

    entities: Int64[Tensor, "types 3"]
    words: Int64[Tensor, " 2"]

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.names, self.types = list(names), types_of(names)
        self.add_state("entities", torch.zeros(len(self.types), 3, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("words", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, probabilities: Float[Tensor, "batch time tags"], target: Int64[Tensor, "batch time"]) -> None:
        """Count the words whose target is not -100."""
        counts, preds = [[0, 0, 0] for _ in self.types], probabilities.argmax(-1)
        for row, true_row in zip(preds.tolist(), target.tolist(), strict=True):
            both = [(self.names[tag], self.names[true]) for tag, true in zip(row, true_row, strict=True) if true >= 0]
            found, there = (entities(tags) for tags in zip(*both, strict=True))
            for column, group in enumerate((found & there, found, there)):
                for kind, *_ in group:
                    counts[self.types.index(kind)][column] += 1
        self.entities += torch.tensor(counts, device=self.entities.device)
        known = target >= 0
        self.words += torch.stack([(preds == target)[known].sum(), known.sum()])

    def compute(self) -> dict[str, Tensor]:
        """The counts, by the names of the states."""
        return {"entities": self.entities, "words": self.words}
