"""Nets of transformers that a config names: causal or refused, their router loss, samples and operations."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch.utils.flop_counter import FlopCounterMode

from common.errors import InputError
from common.nets import causal_lm, language_model, train_logits
from common.optim import MuonAdamW, param_groups
from common.parts import blocks
from recipes.lm.flops import training_flops
from recipes.lm.module import LMModule
from tests.support import ROOT, TINY, logs, main_of, read_metrics, refused, run_ranks

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MIXTURE = {
    **SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


def net_args(kind: str, **settings: Any) -> list[str]:
    args = ["--model.config", f"transformers.{kind}"]
    return args + [part for name, value in settings.items() for part in (f"--model.config.{name}", str(value))]


def lm(kind: str, text: Path, **settings: Any) -> list[str]:
    """A short fit of a net by its config."""
    own = ["--data.path", str(text), "--data.tokenizer", "common.sources.tokenizers.Characters", "--data.context", "32"]
    return ["fit", *own, *net_args(kind, **settings), "--model.sample_tokens", "4", *TINY]


@pytest.mark.parametrize(
    ("kind", "switch"),
    [("Bert", True), ("Electra", True), ("Roberta", True), ("XLMRoberta", True), ("RoFormer", True), ("XLNet", False)],
)
def test_a_net_that_sees_later_tokens_is_refused(kind: str, switch: bool) -> None:
    config = getattr(transformers, f"{kind}Config")
    sizes = {**SIZES, "intermediate_size": 32} if switch else {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 32}
    fix = "set its is_decoder to true" if switch else "take a causal net"
    with pytest.raises(InputError, match=f"model.config: {kind}.* sees the tokens that it should predict; {fix}"):
        causal_lm(config(**sizes), 60)
    if switch:
        net = causal_lm(config(**sizes, is_decoder=True), 60).eval()
        ids = torch.randint(60, (1, 20))
        other = ids.clone()
        other[0, 12] = (ids[0, 12] + 1) % 60
        ours, theirs = (net(input_ids=each, use_cache=False).logits[0] for each in (ids, other))
        torch.testing.assert_close(ours[:12], theirs[:12])
        assert not torch.allclose(ours[12:], theirs[12:])


def test_the_check_draws_no_number_and_keeps_the_mode() -> None:
    config = transformers.LlamaConfig(**SIZES, intermediate_size=64)
    torch.manual_seed(0)
    net = causal_lm(config, 60, 0)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training


def test_a_net_in_16_bits_is_causal_or_not() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        causal_lm(transformers.MixtralConfig(**MIXTURE), 60)
        with pytest.raises(InputError, match="sees the tokens"):
            causal_lm(transformers.BertConfig(**SIZES, intermediate_size=64), 60)
    finally:
        torch.set_default_dtype(torch.float32)


def test_weights_that_see_later_tokens_are_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SIZES, intermediate_size=64, vocab_size=60)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"model.weights .* sees the tokens"):
        language_model(None, str(tmp_path), 60, 32, 0)


def test_the_command_line_refuses_before_the_first_step(
    work: Path, small_text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = refused("lm", lm("BertConfig", small_text, **SIZES), capfd)
    assert line.endswith("sees the tokens that it should predict; set its is_decoder to true")
    assert not list(work.glob("runs/lm/default/checkpoints/*"))
    line = refused("lm", lm("LlamaConfig", small_text, vocab_size=1024), capfd)
    assert "model.config.vocab_size: 1024: the data's tokenizer says" in line
    line = refused("lm", lm("LlamaConfig", small_text, attn_implementation="eager"), capfd)
    assert line.endswith("if its net reads it, give --model.config.dict_kwargs.attn_implementation")
    line = refused("lm", lm("LlamaConfig", small_text, pad_token_id=5), capfd)
    assert "model.config.pad_token_id: 5: the data's tokenizer says None" in line


def test_numbers_that_a_config_wants_are_given() -> None:
    config = transformers.ModernBertDecoderConfig(**SIZES, intermediate_size=32)
    for _ in range(2):  # preflight builds twice
        net = causal_lm(config, 60, 0)
        assert all(part.padding_idx is None for part in net.modules() if isinstance(part, torch.nn.Embedding))
    config = transformers.RobertaConfig(**SIZES, intermediate_size=32, is_decoder=True)
    assert [causal_lm(config, 60, 0).config.pad_token_id for _ in range(2)] == [-1, -1]


def test_the_router_loss_is_transformers() -> None:
    torch.manual_seed(0)
    net: Any = causal_lm(transformers.MixtralConfig(**MIXTURE, router_aux_loss_coef=0.5), 60)
    ids = torch.randint(60, (3, 16))
    logits, further = train_logits(net, ids, 0.5)
    expected = net(input_ids=ids, labels=ids, output_router_logits=True)
    plain = net(input_ids=ids, labels=ids).loss
    assert torch.equal(logits, expected.logits)
    torch.testing.assert_close(plain + further, expected.loss)
    assert further > 0.5  # the loss of even use is the number of experts of a token


@pytest.mark.parametrize("recipe", ["lm", "curriculum"])
def test_training_adds_the_router_loss(recipe: str, work: Path, small_text: Path, no_report: None) -> None:
    losses = []
    for factor in (0.0, 0.5):
        args = lm("MixtralConfig", small_text, **MIXTURE, router_aux_loss_coef=factor)
        if recipe == "curriculum":  # it draws no samples
            del args[(place := args.index("--model.sample_tokens")) : place + 2]
        main_of(recipe)([*args, "--name", str(factor)])
        losses.append(read_metrics(work / f"runs/{recipe}/{factor}/metrics.csv", "train/loss")[0])
    assert losses[1] - losses[0] == pytest.approx(0.5 * 2, rel=0.05)  # each token meets two of four experts


def drawn(count: int, **settings: Any) -> set[int]:
    """The tokens that follow one prompt in so many samples."""
    config = transformers.LlamaConfig(**SIZES, intermediate_size=64)
    module = LMModule(config, 200, 0, 32, sample_tokens=1, optimizer=torch.optim.SGD, **settings)
    module.configure_model()
    its: Any = module.net.generation_config
    its.top_k, its.min_p = 3, 0.9  # as a pretrained net may have it
    torch.manual_seed(0)
    return {module.generate(torch.tensor([[1, 2, 3]]))[-1] for _ in range(count)}


def test_samples_are_of_the_nets_distribution() -> None:
    assert len(drawn(200, temperature=1.0)) > 80  # near a uniform one, of 200 tokens
    assert len(drawn(40, temperature=1.0, top_k=5)) == 5
    assert len(drawn(20, temperature=1.0, top_p=0.004)) == 1
    assert len(drawn(5, temperature=0.0)) == 1


@pytest.mark.parametrize(("flag", "value"), [("top_k", "0"), ("top_p", "0"), ("top_p", "1.5")])
def test_wrong_samples_are_refused(
    flag: str, value: str, work: Path, lm_args: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    line = refused("lm", ["fit", *lm_args, f"--model.{flag}", value], capfd)
    assert line.startswith(f"--model.{flag}: {value}") or f"model.{flag} {value}" in line


FLOPS = {
    "LlamaConfig": {"intermediate_size": 64, "tie_word_embeddings": True},
    "GPT2Config": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "MixtralConfig": {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 8, "head_dim": 16},
}


@pytest.mark.parametrize("kind", FLOPS)
def test_operations_are_those_that_torch_counts(kind: str) -> None:
    sizes = FLOPS[kind] if kind == "GPT2Config" else SIZES | FLOPS[kind]
    net: Any = causal_lm(getattr(transformers, kind)(**sizes, attn_implementation="eager"), 500)
    if kind == "MixtralConfig":
        net.set_experts_implementation("eager")  # grouped products are not counted
    ids = torch.randint(500, (2, 64))
    with FlopCounterMode(display=False) as counter:
        net(input_ids=ids, use_cache=False).logits.sum().backward()
    assert training_flops(net, 64) == pytest.approx(counter.get_total_flops() / ids.numel(), rel=0.03)


def test_a_state_spaces_rates_do_not_decay_and_experts_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    net = causal_lm(transformers.MambaConfig(hidden_size=32, num_hidden_layers=2), 60)
    net.get_parameter("backbone.layers.0.mixer.in_proj.weight")._no_weight_decay = True  # type: ignore[attr-defined]
    kept = {id(p) for group in param_groups(net) if "weight_decay" in group for p in group["params"]}
    names = {name for name, p in net.named_parameters() if id(p) in kept and p.ndim > 1}
    assert names == {
        "backbone.layers.0.mixer.A_log",
        "backbone.layers.1.mixer.A_log",
        "backbone.layers.0.mixer.in_proj.weight",
    }
    MuonAdamW(param_groups(causal_lm(transformers.MixtralConfig(**MIXTURE), 60)))
    assert "AdamW takes 4 parameters of three axes, such as those of experts" in capsys.readouterr().out


def test_of_blocks_within_blocks_the_outer_ones_count() -> None:
    net = causal_lm(transformers.FalconMambaConfig(hidden_size=32, num_hidden_layers=2), 60)
    assert [type(block).__name__ for block in blocks(net)] == ["FalconMambaBlock"] * 2


def test_settings_beside_a_config_and_a_net_without_generate(
    work: Path, small_text: Path, no_report: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    args = lm("Qwen3MoeConfig", small_text, **SIZES, num_key_value_heads=2, moe_intermediate_size=16, num_experts=4)
    further = {"head_dim": 8, "attn_implementation": "eager"}
    args += [part for name, value in further.items() for part in (f"--model.config.dict_kwargs.{name}", str(value))]
    args += ["--model.config.num_experts_per_tok", "2"]
    monkeypatch.setattr(transformers.Qwen3MoeForCausalLM, "can_generate", classmethod(lambda _: False))
    net = main_of("lm")(args).model.net
    assert net.config._attn_implementation == "eager"
    assert net.get_parameter("model.layers.0.self_attn.q_proj.weight").shape == (2 * 8, 32)
    assert "the net has no generate, so validations write no sample" in capfd.readouterr().out
    assert "cannot continue a prompt" in refused("lm", ["predict", *args[1:], "--ckpt_path", "last"], capfd)


def test_mamba_trains_under_fsdp2(work: Path, small_text: Path, no_report: None) -> None:
    args = lm("FalconMambaConfig", small_text, hidden_size=32, num_hidden_layers=2, state_size=4)
    layer = [
        "--config",
        str(ROOT / "configs/strategy/fsdp2.yaml"),
        "--trainer.accelerator",
        "cpu",
        "--trainer.devices",
        "2",
    ]
    assert run_ranks(main_of("lm"), [*args, *layer], folder=work / "ranks") == [0, 0], logs(work / "ranks")
    assert math.isfinite(read_metrics(work / "runs/lm/default/metrics.csv", "val/loss")[-1])


# Small values of the sizes that configs have; a class takes those that it knows.
SMALL: dict[str, Any] = {
    **dict.fromkeys((
        "hidden_size", "intermediate_size", "d_model", "decoder_ffn_dim", "encoder_ffn_dim", "n_embd", "n_inner", "dff",
        "d_inner", "embedding_size", "dim_ff", "emb_dim", "ffn_dim", "lru_width", "attention_hidden_size",
    ), 32),
    **dict.fromkeys((
        "num_hidden_layers", "decoder_layers", "encoder_layers", "n_layer", "n_layers", "num_layers",
        "num_key_value_heads", "num_experts_per_tok", "moe_topk", "index_n_heads", "linear_num_key_heads",
    ), 2),
    **dict.fromkeys((
        "num_attention_heads", "decoder_attention_heads", "encoder_attention_heads", "n_head", "n_heads", "num_heads",
        "num_experts", "n_routed_experts", "num_local_experts", "rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim",
        "linear_num_value_heads", "mamba_n_heads",
    ), 4),
    **dict.fromkeys((
        "head_dim", "q_lora_rank", "kv_lora_rank", "v_head_dim", "mamba_d_state", "state_size", "linear_key_head_dim",
        "linear_value_head_dim", "index_head_dim", "dim_head", "d_head", "attn_head_dim", "hidden_size_per_layer_input",
        "index_topk",
    ), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "mamba_d_head"), 16),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "mamba_n_groups"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "vocab_size_per_layer_input"), 64),
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {  # what a class checks of its sizes
    "AXK2Config": {"num_key_value_heads": 4},
    "DeepseekV32Config": {"num_key_value_heads": 4},
    "Dots3NoteConfig": {"num_key_value_heads": 4},
    "Dots3NoteTextConfig": {"num_key_value_heads": 4},
    "FalconH1Config": {"mamba_d_ssm": 64},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma4AssistantConfig": {"hidden_size_per_layer_input": 0},
    "GlmMoeDsaConfig": {"num_key_value_heads": 4},
    "LongcatFlashConfig": {"head_dim": 4},
    "Mamba2Config": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "ZambaConfig": {"num_hidden_layers": 3},
    "Zamba2Config": {"num_hidden_layers": 54},
    "ZayaConfig": {"num_experts_per_tok": 1},
}
# Without an option to make them causal, or by their default.
NOT_CAUSAL = {
    "BertConfig", "BertGenerationConfig", "BigBirdConfig", "CamembertConfig", "CpmAntConfig", "Data2VecTextConfig",
    "ElectraConfig", "ErnieConfig", "MegatronBertConfig", "RemBertConfig", "RoCBertConfig", "RoFormerConfig",
    "RobertaConfig", "RobertaPreLayerNormConfig", "XLMRobertaConfig", "XLMRobertaXLConfig", "XLNetConfig",
}  # fmt: skip
CAUSAL = sorted({config.__name__ for config in transformers.MODEL_FOR_CAUSAL_LM_MAPPING})
OTHERS = {
    config.__name__
    for kinds in (transformers.MODEL_FOR_MASKED_LM_MAPPING, transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING)
    for config in kinds
}


def small_config(kind: str) -> Any:
    made = getattr(transformers, kind)
    sizes = {**SMALL, **OWN.get(kind, {})}
    known = {name: value for name, value in sizes.items() if name in inspect.signature(made).parameters}
    part = (getattr(made, "sub_configs", None) or {}).get("text_config")
    if part not in (None, transformers.AutoConfig):
        known["text_config"] = {
            name: value for name, value in sizes.items() if name in inspect.signature(part).parameters
        }
    return made(**known)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", CAUSAL)
def test_every_net_that_a_config_names_is_causal_or_refused(
    kind: str, record_property: Callable[[str, Any], None]
) -> None:
    try:
        config = small_config(kind)
    except (ValueError, StrictDataclassError) as error:  # the parser says so
        pytest.skip(f"{kind}: {error}")
    line, net = "", None
    try:
        with torch.device("meta"):
            size = sum(p.numel() for p in causal_lm(config, 60, 0).parameters())
        if size > 30_000_000:
            pytest.skip(f"{kind}: {size:,} parameters of parts that are not the text's")
        net = causal_lm(config, 60, 0).train()
    except InputError as error:
        line = str(error)
    assert ("sees the tokens" in line) is (kind in NOT_CAUSAL), line
    if net is None:
        record_property("summary", line)
        assert len(line) <= 240
        assert "\n" not in line
        return
    ids = torch.randint(60, (1, 20))
    logits = net(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[0], ids[0]).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    other = ids.clone()
    other[0, 12] = (ids[0, 12] + 1) % 60
    with torch.no_grad():
        ours, theirs = (net.eval()(input_ids=each, use_cache=False).logits[0, :12] for each in (ids, other))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", sorted(OTHERS - {*CAUSAL}))
def test_other_language_models_are_refused(kind: str) -> None:
    with pytest.raises(InputError, match="makes no language model"):
        causal_lm(getattr(transformers, kind)(), 60, 0)
