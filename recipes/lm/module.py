"""The module: a language model trained with next-token prediction, and text samples of it."""

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PretrainedConfig
from typing_extensions import override

from common.data import global_seed, seed_draws, step_seed
from common.errors import InputError
from common.losses import cross_entropy, text_scores, window_losses
from common.module import BaseModule, Stage
from common.nets import check_net, freeze_blocks, language_model, router_factor, train_logits
from common.parts import gathered

from .data import Batch, PromptBatch, PromptDataset
from .flops import training_flops


class LMModule(BaseModule):
    """A decoder-only transformer trained with the cross-entropy of the next token.

    Args:
        config: any causal language model of transformers, by its config's class path and settings; None for that of the
            weights.
        vocab_size: number of tokens; comes from the data.
        eos_id: the token that ends a text; comes from the data.
        context: tokens of a window; comes from the data.
        weights: folder or hub name of a causal language model of transformers to train further; None for a new one.
        frozen_blocks: how many of its first blocks stay as they are, and with them the embeddings.
        sample_tokens: length of the sample after each validation; 0 for none.
        temperature: of the samples; 0 takes the most likely token, 1 is the net's own distribution.
        top_k: draw samples of the so many most likely tokens; None for all.
        top_p: draw them of the most likely tokens that have this share of the probability together; None for all.
        kwargs: of :class:`common.module.BaseModule`.
    """

    unit = "tokens"
    router = 0.0  # factor of the router loss
    flops: float | None = None  # of a token

    def __init__(
        self,
        config: PretrainedConfig | None,
        vocab_size: int,
        eos_id: int,
        context: int,
        weights: str | None = None,
        frozen_blocks: int = 0,
        sample_tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        check_net(config, weights, context)
        self.weights, self.frozen_blocks = weights, frozen_blocks
        self.config, self.vocab_size, self.eos_id = config, vocab_size, eos_id
        self.context = context
        for name, value in (("sample_tokens", sample_tokens), ("temperature", temperature)):
            if value < 0:
                raise InputError(f"model.{name} {value} is negative; it must be 0 or more")
        if top_k is not None and top_k < 1:
            raise InputError(f"model.top_k {top_k} must be 1 or more; give null for all tokens")
        if top_p is not None and not 0 < top_p <= 1:
            raise InputError(f"model.top_p {top_p} must be above 0 and at most 1; give null for all tokens")
        self.sample_tokens, self.temperature, self.top_k, self.top_p = sample_tokens, temperature, top_k, top_p

    @override
    def build_net(self) -> nn.Module:
        net = language_model(self.config, self.weights, self.vocab_size, self.context, self.eos_id)
        self.frozen = freeze_blocks(net, self.frozen_blocks)
        self.router, self.flops = router_factor(net), training_flops(net, self.context)
        return net

    def forward(self, batch: Batch) -> Float[Tensor, "batch time vocab"]:
        """Logits of the next token at each position."""
        return self.net(input_ids=batch.input_ids, use_cache=False).logits

    @override
    def shared_step(self, batch: Batch, stage: Stage) -> tuple[Tensor, Tensor]:
        if stage == "train":
            logits, further = train_logits(self.net, batch.input_ids, self.router)
            loss = cross_entropy(logits.flatten(0, 1), batch.target.flatten()) + further
            return loss, (batch.target != -100).sum()
        target = batch.target.masked_fill(~batch.mask[:, None], -100)
        total, count = window_losses(self(batch), target)
        self.note_losses((total / count)[batch.mask])
        return total.sum() / count.sum(), count.sum()

    @override
    def captions(self, batch: Batch) -> list[str]:
        return []  # the text says it

    @override
    def on_evaluation_end(self, stage: Stage) -> None:
        scores = text_scores(stage, self.mean_loss[stage].compute(), self.data.corpus.bytes_per_token[stage])
        self.log_dict(scores, sync_dist=True)

    def generate(self, prompt: Tensor) -> list[int]:
        """Continue a prompt (1, time) by up to ``sample_tokens``; past ``context`` it sees the last half of one."""
        net, ids, end = self.net.eval(), prompt[0].tolist(), prompt.shape[1] + self.sample_tokens
        options: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            # Else a net's generation config, or transformers' 50 likeliest tokens, would decide.
            options = {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k or 0}
            options |= {"top_p": self.top_p or 1.0, "min_p": None, "typical_p": 1.0}
        options |= {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        options |= {"pad_token_id": self.eos_id, "synced_gpus": bool(self._trainer) and self.trainer.world_size > 1}
        # With sharded weights, all ranks must call the net equally often.
        while self._any_rank(len(ids) < end):
            seen = torch.tensor([ids if len(ids) < self.context else ids[-max(self.context // 2, 1) :]])
            options["max_new_tokens"] = max(min(end - len(ids), self.context - seen.shape[1]), 1)
            # Every token changes the length, and compiled blocks would compile again for each length.
            with gathered(net), torch.compiler.set_stance("force_eager"):
                new: Any = net.generate(seen.to(self.device), **options)  # type: ignore[operator]
            ids += new[0, seen.shape[1] :].tolist() if len(ids) < end else []
            end = len(ids) if ids[-1] == self.eos_id else end
        self.train(self.training)
        return ids

    @property
    def generates(self) -> bool:
        """Whether the net can continue a prompt."""
        return hasattr(self.net, "generate") and getattr(self.net, "can_generate", lambda: True)()

    @override
    def on_fit_start(self) -> None:
        if self.sample_tokens and not self.generates and self.trainer.is_global_zero:
            print("model.sample_tokens: the net has no generate, so validations write no sample", flush=True)

    def _any_rank(self, decision: bool) -> bool:
        return self.trainer.strategy.reduce_boolean_decision(decision, all=False) if self._trainer else decision

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the data."""
        return Tokenizer.from_str(self.facts["tokenizer"])

    @override
    def encode(self, samples: list[str]) -> PromptDataset:
        """Texts to continue; the same seed (``lightning.seed_everything``) draws the same."""
        return PromptDataset(samples, self.tokenizer, "samples")

    @override
    def predict(self, samples: list[str], batch_size: int = 1) -> dict[str, list[Any]]:
        return super().predict(samples, 1)

    @override
    def predict_step(self, batch: PromptBatch) -> dict[str, list[Any]]:
        if not self.generates:
            raise InputError("model.config: this net has no generate, so it cannot continue a prompt; take another")
        # A text depends on its place among the prompts, not on the rank that draws it.
        seed_draws(step_seed(global_seed(), int(batch.index)), self.device)
        both = batch.input_ids[0].tolist(), self.generate(batch.input_ids)
        prompt, text = (self.tokenizer.decode(ids) for ids in both)
        columns = {"index": int(batch.index), "prompt": prompt, "text": text}
        return {name: [value] if batch.mask[0] else [] for name, value in columns.items()}

    @override
    def media(self, stage: str) -> dict[str, Any]:
        if not (self.sample_tokens and self.generates):
            return {}
        prompt = torch.from_numpy(self.data.corpus.val[:8].astype("int64"))[None]
        return {"samples": self.data.tokenizer.decode(self.generate(prompt))}

    @override
    def flops_per_item(self) -> float | None:
        return self.flops

    @override
    def num_items(self, batch: Batch) -> int:
        return batch.input_ids.numel()
