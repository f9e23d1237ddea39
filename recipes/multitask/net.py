"""Hard parameter sharing: one body for all tasks, and a head per task (https://doi.org/10.1023/A:1007379606734)."""

import torch
import torch._functorch.config
from torch import Tensor, nn

from common.errors import InputError

from .tasks import Task
from .weighting import Weighting


class MultiTaskNet(nn.Module):
    """A shared body and one linear head per task.

    Args:
        body: maps the inputs to ``features`` numbers per sample.
        features: width of the body's output.
        tasks: the task of each head.
        weighting: weights of the tasks; a part of the net, so it is optimized, sharded and saved with it.
    """

    def __init__(self, body: nn.Module, features: int, tasks: list[Task], weighting: Weighting):
        super().__init__()
        # A compiled body is differentiated once per task, so its buffers must outlive the first pass.
        torch._functorch.config.donated_buffer = False
        self.body, self.features, self.weighting = body, features, weighting
        self.heads = nn.ModuleDict({task["name"]: nn.Linear(features, task["width"]) for task in tasks})

    def forward(self, **inputs: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Each task's output (batch, width), and the state of the weighting (tasks).

        Raises:
            InputError: the body's output has another shape.
        """
        features = self.body(**inputs)
        if not isinstance(features, Tensor) or features.ndim != 2 or features.shape[1] != self.features:
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            problem = f"{type(self.body).__name__} gives {found}, not (batch, {self.features})"
            raise InputError(f"model.net: {problem}; take a net of common.nets")
        active = features.relu()
        return {name: head(active) for name, head in self.heads.items()}, self.weighting()
