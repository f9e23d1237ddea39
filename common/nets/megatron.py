"""A GPT of Megatron-LM's layers as a net of transformers: any recipe that takes a ``PretrainedConfig`` can train it.

Every rank builds the whole net. :class:`common.strategies.megatron.Megatron` then keeps a slice of it; other strategies
treat it like any net.
"""

import importlib.util
import warnings
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import CausalLMOutput
from typing_extensions import override

from common.errors import InputError


class MegatronConfig(PretrainedConfig):
    """Sizes of a :class:`MegatronLM`, by transformers' names.

    Args:
        hidden_size: width of the residual stream.
        intermediate_size: width inside the feed-forward layers; None for 4 times ``hidden_size``.
        num_hidden_layers: number of blocks.
        num_attention_heads: heads of each block, a divisor of ``hidden_size``.
        num_key_value_heads: heads of keys and values, a divisor of ``num_attention_heads``; None for the same number.
        max_position_embeddings: number of learned positions: the longest window.
        activation: GELU, or SwiGLU (https://arxiv.org/abs/2002.05202) with 1.5 times the parameters.
        normalization: of the residual stream before each layer.
        bias: whether linear layers have a bias.
        hidden_dropout: probability after the embedding and each layer.
        attention_dropout: probability of an attention weight.
        tie_word_embeddings: whether the head shares the embedding's weight.
        initializer_range: standard deviation of initial weights; for output projections divided by sqrt(2 layers).
        vocab_size: number of tokens; a recipe takes it from its data.

    Raises:
        InputError: Megatron is not installed, or a number of heads is no such divisor.
    """

    model_type = "megatron_core_gpt"

    def __init__(
        self,
        hidden_size: int = 768,
        intermediate_size: int | None = None,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        max_position_embeddings: int = 1024,
        activation: Literal["gelu", "swiglu"] = "gelu",
        normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm",
        bias: bool = True,
        hidden_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        tie_word_embeddings: bool = True,
        initializer_range: float = 0.02,
        vocab_size: int = 50257,
        **kwargs: Any,
    ):
        if importlib.util.find_spec("megatron") is None:
            raise InputError("model.config: megatron-core is not installed; run pip install -e '.[megatron]'")
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.intermediate_size = intermediate_size or 4 * hidden_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        for key, of in (("num_attention_heads", hidden_size), ("num_key_value_heads", num_attention_heads)):
            if (size := getattr(self, key)) < 1 or of % size:
                raise InputError(f"model.config.{key}: {size} is no divisor of {of}; take another")
        self.max_position_embeddings, self.vocab_size = max_position_embeddings, vocab_size
        self.activation, self.normalization, self.bias = activation, normalization, bias
        self.hidden_dropout, self.attention_dropout = hidden_dropout, attention_dropout
        self.tie_word_embeddings, self.initializer_range = tie_word_embeddings, initializer_range
        super().__init__(**kwargs)


class Attention(nn.Module):
    """Causal attention by torch; Megatron's own needs a GPU."""

    def __init__(self, config: Any, **_: Any):
        super().__init__()
        self.dropout = config.attention_dropout

    def forward(
        self,
        query: Float[Tensor, "time batch heads dim"],
        key: Float[Tensor, "time batch groups dim"],
        value: Float[Tensor, "time batch groups dim"],
        *_: Any,
        **__: Any,
    ) -> Float[Tensor, "time batch features"]:
        """Attend to all earlier positions, with this rank's heads."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        attended = nn.functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
        )
        return attended.permute(2, 0, 1, 3).flatten(2)


class MegatronLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Megatron-core's ``GPTModel`` (Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053), whole or one rank's slice.

    Args:
        config: its sizes.
        mesh: one-dimensional mesh of the ranks that hold a slice each; None for the whole net. The vocabulary is padded
            to a multiple of their number.
    """

    config: MegatronConfig
    config_class = MegatronConfig
    _no_split_modules: ClassVar = ["TransformerLayer"]
    _supports_sdpa = True

    def __init__(self, config: MegatronConfig, mesh: DeviceMesh | None = None):
        super().__init__(config)
        self.mesh = mesh
        ranks = mesh.size() if mesh else 1
        with warnings.catch_warnings(action="ignore"):  # about missing fast packages, and its own deprecated calls
            self.model = _gpt(config, -(-config.vocab_size // ranks) * ranks, mesh.get_group() if mesh else None)
        self.register_state_dict_post_hook(_drop_extra_state)
        self.post_init()

    @override
    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to do: Megatron initializes its layers itself."""

    @override
    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule("model.embedding.word_embeddings")

    @override
    def get_output_embeddings(self) -> None:
        """None: a tied head uses the embedding's weight."""

    def forward(
        self,
        input_ids: Int64[Tensor, "batch time"],
        attention_mask: Tensor | None = None,
        labels: Int64[Tensor, "batch time"] | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """Logits (batch, time, vocab) of the next token at each position, whole on every rank.

        Args:
            input_ids: tokens, without padding.
            attention_mask: all ones, as callers of transformers pass it.
            labels: the tokens again, for transformers' loss; -100 where a position does not count.

        Raises:
            InputError: the tokens are padded, or autocast runs on a CPU; Megatron's layers support neither.
        """
        if attention_mask is not None and not attention_mask.all():
            raise InputError("model.config: Megatron's layers attend to all tokens before; give them no padding")
        if input_ids.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            raise InputError("trainer.precision: Megatron's layers have no autocast on a CPU; take fp32 or bf16-true")
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        logits = self.model(input_ids, positions, attention_mask=None)
        if self.mesh is not None:  # by torch: Megatron's own gathering needs a GPU
            slices = DTensor.from_local(logits, self.mesh, [Shard(-1)], run_check=False)
            logits = slices.redistribute(placements=[Replicate()]).to_local()[..., : self.config.vocab_size]
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def sliced(self, mesh: DeviceMesh) -> "MegatronLM":
        """This rank's slice of a whole net, with its weights."""
        with no_init_weights():
            net = MegatronLM(self.config, mesh)
        net.model.to(self.device, self.dtype)
        wholes = dict(self.named_parameters())
        for name, p in net.named_parameters():
            p.whole_shape = wholes[name].shape  # type: ignore[attr-defined]  # next to Megatron's own notes
            p.copy_(slice_of(wholes[name], p, mesh))
            p.requires_grad_(wholes[name].requires_grad)
        return net.train(self.training)


def _gpt(config: MegatronConfig, vocab_size: int, group: dist.ProcessGroup | None) -> nn.Module:
    from megatron.core.models.common.embeddings import language_model_embedding  # type: ignore[import-not-found]
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # type: ignore[import-not-found]
    from megatron.core.models.gpt.gpt_model import GPTModel  # type: ignore[import-not-found]
    from megatron.core.process_groups_config import ProcessGroupCollection  # type: ignore[import-not-found]
    from megatron.core.tensor_parallel import layers, mappings  # type: ignore[import-not-found]
    from megatron.core.transformer.transformer_config import TransformerConfig  # type: ignore[import-not-found]

    # These modules would ignore a given group if torch.distributed is not initialized.
    patched: tuple[Any, ...] = (language_model_embedding, layers, mappings)
    for module in patched:
        module.get_tensor_model_parallel_group_if_none = lambda group, **_: group
    alone = dist.ProcessGroup(0, 1)  # type: ignore[call-arg]
    gated = config.activation == "swiglu"
    sizes = TransformerConfig(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        hidden_dropout=config.hidden_dropout,
        attention_dropout=config.attention_dropout,
        gated_linear_unit=gated,
        activation_func=nn.functional.silu if gated else nn.functional.gelu,
        normalization=config.normalization,  # type: ignore[arg-type]
        add_bias_linear=config.bias,
        init_method_std=config.initializer_range,
        params_dtype=torch.get_default_dtype(),
        tensor_model_parallel_size=(group or alone).size(),
        use_cpu_initialization=True,  # the same weights on every device
        # These need Apex, Transformer Engine or a GPU.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        cuda_graph_scope=[],
    )
    spec: Any = get_gpt_layer_local_spec(normalization=config.normalization)
    spec.submodules.self_attention.submodules.core_attention = Attention
    return GPTModel(
        sizes,
        spec,
        vocab_size=vocab_size,
        max_sequence_length=config.max_position_embeddings,
        share_embeddings_and_output_weights=config.tie_word_embeddings,
        pg_collection=ProcessGroupCollection(tp=group or alone, cp=alone, pp=alone, embd=None),
    )


def _drop_extra_state(_: nn.Module, state: dict[str, Any], *__: Any) -> None:
    """Drop Megatron's entries for Transformer Engine from a state: None for every linear layer."""
    for name in [name for name in state if name.endswith("_extra_state")]:
        del state[name]


def is_sliced(parameter: Tensor) -> bool:
    """Whether ranks hold slices of a parameter, as Megatron notes; otherwise each holds the whole."""
    return getattr(parameter, "tensor_model_parallel", False)


def slice_of(whole: Tensor, parameter: Any, mesh: DeviceMesh) -> Tensor:
    """This rank's slice of a whole parameter, or of a tensor of its shape such as its optimizer state.

    The slice is one piece along ``partition_dim``. If a layer joins the weights of two, it is a piece of each
    (``partition_stride``). The vocabulary is padded with zeros.
    """
    if not is_sliced(parameter):
        return whole
    dim, ranks = parameter.partition_dim, mesh.size()
    padding = list(whole.shape)
    padding[dim] = parameter.shape[dim] * ranks - whole.shape[dim]
    pieces = torch.cat([whole, whole.new_zeros(padding)], dim).chunk(ranks * parameter.partition_stride, dim)
    return torch.cat(pieces[mesh.get_local_rank() :: ranks], dim)


def whole_of(mine: Tensor, parameter: Any, mesh: DeviceMesh) -> Tensor:
    """The inverse of :func:`slice_of`, on every rank of the mesh."""
    if not is_sliced(parameter):
        return mine
    dim = parameter.partition_dim
    slices = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(mesh.size())]
    dist.all_gather(slices, mine.contiguous(), group=mesh.get_group())
    pieces = zip(*(part.chunk(parameter.partition_stride, dim) for part in slices), strict=True)
    whole = torch.cat([piece for of_all in pieces for piece in of_all], dim)
    return whole.narrow(dim, 0, parameter.whole_shape[dim])


AutoConfig.register(MegatronConfig.model_type, MegatronConfig)
AutoModelForCausalLM.register(MegatronConfig, MegatronLM)
