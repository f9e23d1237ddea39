"""The objective: predict the next token, of what the present stage shows."""

import math
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from typing_extensions import override

from common.callbacks import run_folder
from common.curriculum import Pacing
from common.errors import InputError
from common.losses import cross_entropy
from common.module import BaseModule, Stage

from .data import Batch


class CurriculumModule(BaseModule):
    """A decoder-only transformer trained with the cross-entropy of the next token, in stages.

    Args:
        config: any causal language model of transformers, by its config's class path and settings.
        vocab_size: number of tokens; comes from the data.
        bytes_per_token: UTF-8 bytes of an average token; comes from the data.
        context: tokens of a window; comes from the data.
        self_paced: leave windows out of a step whose loss is above this share of ``log(vocab_size)``, the loss of
            guessing (Kumar et al. 2010, https://papers.nips.cc/paper/3923); None for none.
        kwargs: of :class:`common.module.BaseModule`.
    """

    unit = "tokens"

    def __init__(
        self,
        config: PretrainedConfig,
        vocab_size: int,
        bytes_per_token: float,
        context: int,
        self_paced: Pacing | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.config, self.bytes_per_token, self.self_paced = config, bytes_per_token, self_paced
        config.vocab_size = vocab_size
        config.bos_token_id = config.eos_token_id = config.pad_token_id = None
        if context > (positions := getattr(config, "max_position_embeddings", context)):
            raise InputError(f"data.context {context} exceeds model.config's max_position_embeddings {positions}")

    @override
    def build_net(self) -> nn.Module:
        try:
            return AutoModelForCausalLM.from_config(self.config)  # SDPA attention wherever the net has it
        except (ValueError, KeyError) as error:
            raise InputError(f"model.config: {type(self.config).__name__} makes no language model: {error}") from error

    def forward(self, batch: Batch) -> Float[Tensor, "batch time vocab"]:
        """Logits of the next token at each position."""
        return self.net(input_ids=batch.input_ids, use_cache=False).logits

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if not self.trainer.fit_loop._should_accumulate():  # the step is complete
            micro_batches = self.trainer.world_size * self.trainer.accumulate_grad_batches
            self.data.tokens_seen += batch.input_ids.numel() * micro_batches
        return loss

    def window_losses(self, batch: Batch) -> Float[Tensor, " batch"]:
        """Mean loss of each window's targets; NaN where it has none."""
        loss = nn.functional.cross_entropy(self(batch).float().mT, batch.target, reduction="none")
        return loss.sum(1) / (batch.target != -100).sum(1)

    @override
    def shared_step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor]:
        if stage == "train" and self.self_paced and (share := self.self_paced(self.data.tokens_seen)) < 1:
            each = self.window_losses(batch)
            easy = each.detach() <= share * math.log(self.config.vocab_size)
            return (each * easy).mean(), batch.mask.sum()  # over all windows, so that micro-batches and ranks are equal
        target = batch.target if stage == "train" else batch.target.masked_fill(~batch.mask[:, None], -100)
        loss = cross_entropy(self(batch).flatten(0, 1), target.flatten())
        return loss, (target != -100).sum()

    @property
    def data(self) -> Any:
        """The data module, which knows the stage."""
        return self.trainer.datamodule  # type: ignore[attr-defined]

    @override
    def train_metrics(self) -> dict[str, float]:
        stage = self.data.stage(self.data.tokens_seen)._asdict()
        return {"curriculum/tokens": float(self.data.tokens_seen)} | {f"curriculum/{k}": v for k, v in stage.items()}

    @override
    def on_evaluation_end(self, stage: Stage) -> None:
        loss = self.mean_loss[stage].compute()
        bits = loss / math.log(2) / self.bytes_per_token
        self.log_dict({f"{stage}/perplexity": loss.exp(), f"{stage}/bits_per_byte": bits}, sync_dist=True)

    @override
    def predict_step(self, batch: Batch) -> dict[str, list[Any]]:
        texts = [self.data.tokenizer.decode(ids.tolist()) for ids in batch.input_ids[batch.mask]]
        return {"loss": self.window_losses(batch)[batch.mask].tolist(), "text": texts}

    @override
    def media(self, stage: str) -> dict[str, Any]:
        from common.report import curriculum

        figure = curriculum(run_folder(self.trainer))
        return {"curriculum": figure} if figure and stage == "val" else {}

    @override
    def num_items(self, batch: Batch) -> int:
        return batch.input_ids.numel()
