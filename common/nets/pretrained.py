"""Pretrained nets of transformers with their heads."""

from pathlib import Path
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)
from transformers.utils.logging import disable_progress_bar

from common.checksums import check_files
from common.errors import InputError


class Pretrained(nn.Module):
    """A pretrained net of transformers with its head, such as a teacher.

    Args:
        num_classes: number of classes of the data and the head. A language model may know more tokens; they are left
            out.
        name: folder or hub name of the net (safetensors weights).
        task: what its head does.

    Raises:
        InputError: there is no such net, or its head has other classes.
    """

    def __init__(self, num_classes: int, name: str, task: Literal["image", "text", "next token"] = "image"):
        super().__init__()
        disable_progress_bar()  # it would write to stderr
        kinds = AutoModelForImageClassification, AutoModelForSequenceClassification, AutoModelForCausalLM
        kind = dict(zip(("image", "text", "next token"), kinds, strict=True))[task]
        check_files(Path(name))
        try:
            self.model = kind.from_pretrained(name, use_safetensors=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:80]
            problem = f"neither a folder with such a net in safetensors nor a hub name ({reason})"
            raise InputError(f"{type(self).__name__} name {name!r}: {problem}") from error
        self.num_classes, language = num_classes, task == "next token"
        found: int = self.model.config.vocab_size if language else self.model.config.num_labels  # type: ignore
        if found < num_classes or (found > num_classes and not language):
            raise InputError(f"{type(self).__name__} name {name!r}: has {found} classes, the data {num_classes}")

    def forward(self, **inputs: Tensor) -> Float[Tensor, "*batch classes"]:
        """Logits of a batch."""
        return self.model(**inputs).logits[..., : self.num_classes]
