"""Megatron's tensor parallelism: what it computes, its checkpoints, and what it refuses."""

import importlib.util
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.checkpoint import read_checkpoint
from common.errors import InputError
from common.nets import causal_lm
from common.nets.megatron import MegatronConfig, MegatronLM, is_sliced, slice_of, whole_of
from common.strategies.megatron import Megatron
from tests.support import ROOT, TINY, difference, halved, logs, main_of, read_metrics, run_ranks
from tests.test_faults import FAULTS, faulty_main
from tests.test_resume import digest, killed_main, write_config

pytestmark = pytest.mark.usefixtures("no_report")

PRESET = ["--config", str(ROOT / "recipes/lm/megatron.yaml")]
NET = "--model.config.init_args"
installed = importlib.util.find_spec("megatron") is not None
needs_megatron = pytest.mark.skipif(not installed, reason="megatron-core is not installed")
if installed:  # once, for all ranks that are forked
    pytest.importorskip("megatron.core.models.gpt.gpt_model")

SINGLE = ["--trainer.strategy", "auto"]

# A vocabulary that is no multiple of two, all that can be sliced in a way of its own, and GPT-2's layers.
KINDS = {
    "gpt2": ["--trainer.gradient_clip_val", "0.5"],
    "swiglu": [
        f"{NET}.activation", "swiglu", f"{NET}.normalization", "RMSNorm", f"{NET}.bias", "false",
        f"{NET}.num_attention_heads", "4", f"{NET}.num_key_value_heads", "2", f"{NET}.tie_word_embeddings", "false",
        "--trainer.gradient_clip_val", "0.5", "--trainer.accumulate_grad_batches", "2",
    ],
}  # fmt: skip


@pytest.fixture
def fit(work: Path, lm_args: list[str]) -> Any:
    """Train on so many ranks, in groups of so many, eight samples per micro-batch, and return the run's folder."""

    def run(name: str, world: int, together: int, *args: str) -> Path:
        command = [
            "fit", *PRESET, *lm_args, "--name", name, "--data.batch_size", str(8 * together // world),
            "--trainer.accelerator", "cpu", "--trainer.devices", str(world),
            "--trainer.strategy.init_args.tensor_parallel", str(together), "--trainer.log_every_n_steps", "1",
            "--trainer.check_val_every_n_epoch", "null", "--trainer.enable_progress_bar", "false", *args,
        ]  # fmt: skip
        codes = run_ranks(main_of("lm"), command, world=world, folder=work / name)
        assert codes == [0] * world, logs(work / name)
        return work / "runs/lm" / name

    return run


def same_checkpoints(path: Path, expected: Path, tolerance: float) -> None:
    """All weights, and the optimizer's state by its numbers."""
    found, wanted = read_checkpoint(path), read_checkpoint(expected)
    assert list(found["state_dict"]) == list(wanted["state_dict"])
    for name, value in wanted["state_dict"].items():
        assert found["state_dict"][name].shape == value.shape, name
        assert torch.allclose(found["state_dict"][name], value, atol=tolerance), name
    states, others = (checkpoint["optimizer_states"][0] for checkpoint in (wanted, found))
    assert states["param_groups"] == others["param_groups"]
    assert states["state"].keys() == others["state"].keys()
    for number, state in states["state"].items():
        for key, value in state.items():
            assert others["state"][number][key].shape == value.shape, (number, key)
            assert torch.allclose(others["state"][number][key], value, atol=tolerance), (number, key)


@pytest.mark.matrix
@needs_megatron
@pytest.mark.parametrize(
    ("kind", "world", "precision", "tolerance"),
    [
        ("gpt2", 2, "32-true", 1e-5),
        ("gpt2", 2, "64-true", 1e-12),
        ("swiglu", 4, "64-true", 1e-12),
    ],
)
def test_slices_compute_what_one_process_does(
    kind: str, world: int, precision: str, tolerance: float, fit: Any, record_property: Any
) -> None:
    """Losses, clipped gradients' norms, validation; four ranks are two groups, which are data parallel.

    With activations computed again where layers are gated, which wraps the sliced net's blocks anew.
    """
    again = ["--model.activation_checkpointing", "true"] if kind == "swiglu" else []
    args = ["--trainer.max_steps", "20", "--trainer.precision", precision, *KINDS[kind]]
    args += ["--trainer.val_check_interval", "20" if kind == "swiglu" else "10"]
    one, many = fit("one", 1, 1, *SINGLE, *args), fit("many", world, 2, *args, *again)
    worst = 0.0
    for name in ("train/loss", "optim/grad_norm", "val/loss", "val/bits_per_byte"):
        values, expected = (read_metrics(run / "metrics.csv", name) for run in (many, one))
        assert len(expected) == (2 if name.startswith("val/") else 20)
        worst = max(worst, difference(values, expected))
    assert sum(norm > 0.5 for norm in read_metrics(one / "metrics.csv", "optim/grad_norm")) > 5
    record_property("summary", f"largest relative difference: {worst:.1e} ({kind}, {world} ranks, {precision})")
    assert worst < tolerance
    same_checkpoints(many / "checkpoints/last.ckpt", one / "checkpoints/last.ckpt", 10 * tolerance)


@needs_megatron
@pytest.mark.matrix
def test_a_checkpoint_travels(fit: Any, work: Path, record_property: Any) -> None:
    """From two slices to one process, to two groups, to FSDP2's slices, and to DDP, as if nothing had been sliced."""
    args = [*KINDS["swiglu"], "--trainer.val_check_interval", "4"]
    args += ["--model.lr_scheduler", "torch.optim.lr_scheduler.LinearLR", "--trainer.max_steps"]  # however long
    fsdp2 = ["--config", str(ROOT / "configs/strategy/fsdp2.yaml")]
    hops = [(2, 2, []), (1, 1, SINGLE), (4, 2, []), (2, 1, fsdp2), (2, 1, []), (2, 1, ["--trainer.strategy", "ddp"])]
    whole = fit("whole", 1, 1, *SINGLE, *args, str(2 * len(hops)))
    run = work
    for number, (world, together, strategy) in enumerate(hops, 1):
        resumed = ["--ckpt_path", "last"] if number > 1 else []
        run = fit("hops", world, together, *strategy, *args, str(2 * number), *resumed)
    found = read_metrics(run / "metrics.csv", "val/loss")
    expected = read_metrics(whole / "metrics.csv", "val/loss")
    assert len(found) == len(hops)
    record_property("summary", f"val/loss through {len(hops)} ways to train: {difference(found, expected):.1e}")
    assert difference(found, expected) < 1e-5
    same_checkpoints(run / "checkpoints/last.ckpt", whole / "checkpoints/last.ckpt", 1e-5)


@needs_megatron
@pytest.mark.matrix
def test_what_else_is_done_with_a_run(fit: Any, work: Path) -> None:
    """Two ranks write samples; validate, predict and preflight on two ranks and on one agree; export is one net."""
    run = fit(
        "run", 2, 2, "--trainer.max_steps", "4", "--trainer.val_check_interval", "4", "--trainer.limit_val_batches", "2"
    )
    assert len((run / "texts/val-samples.txt").read_text()) > 10
    found: dict[int, Any] = {}
    for world in (2, 1):
        given = ["--name", "run", "--ckpt_path", "last", "--trainer.devices", str(world), "--model.temperature", "0"]
        given += SINGLE if world == 1 else []
        for command in (["validate", *given], ["predict", *given, "--data.prompts", '["The import", "a"]']):
            assert run_ranks(main_of("lm"), command, world=world, folder=work / "logs") == [0] * world, logs(
                work / "logs"
            )
        found[world] = (
            (run / "predict-last/predictions.csv").read_text(),
            read_metrics(run / "validate-last/metrics.csv", "val/loss"),
        )
    assert found[2][0] == found[1][0]
    assert len(found[1][0].splitlines()) > 2
    assert found[2][1] == pytest.approx(found[1][1], rel=1e-6)
    assert run_ranks(main_of("lm"), ["export", "--name", "run"], world=1, folder=work) == [0], logs(work)
    net = AutoModelForCausalLM.from_pretrained(run / "export")
    state = read_checkpoint(run / "checkpoints/best.ckpt")["state_dict"]
    assert isinstance(net, MegatronLM)
    assert all(torch.equal(p, state[f"net.{name}"]) for name, p in net.named_parameters())
    tokens = AutoTokenizer.from_pretrained(run / "export")("The import", return_tensors="pt").input_ids
    logits = net(tokens).logits
    assert logits.shape == (1, 10, net.config.vocab_size)
    loss = nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:])
    assert net(tokens, torch.ones_like(tokens), labels=tokens).loss.item() == pytest.approx(loss.item(), rel=1e-6)
    with pytest.raises(InputError, match="attend to all tokens before; give them no padding"):
        net(tokens, torch.tensor([[0] + [1] * 9]))
    assert [path.name for path in (run / "export").glob("*.safetensors")] == ["model.safetensors"]


def validate_then_fit(args: list[str], path: Path) -> None:
    """With one trainer; the weights of both slices end as of one that has only been trained."""
    cli = main_of("lm")(args)
    if args[0] == "validate":
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    cli.trainer.save_checkpoint(path)


@pytest.mark.matrix
@needs_megatron
def test_a_second_command_of_a_trainer(work: Path, lm_args: list[str]) -> None:
    given = [*PRESET, *TINY, *lm_args, "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
    for command in ("validate", "fit"):
        args = [command, "--ckpt_path", "null", *given]
        codes = run_ranks(validate_then_fit, args, work / f"{command}.ckpt", folder=work / command)
        assert codes == [0, 0], logs(work / command)
    same_checkpoints(work / "validate.ckpt", work / "fit.ckpt", 1e-7)


@needs_megatron
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.matrix)])
def test_killed_run_goes_on_to_the_bit(world: int, work: Path, lm_args: list[str]) -> None:
    args = [
        "fit", *PRESET, "--config", str(write_config(work, {"every_n_train_steps": 5})), *lm_args,
        "--data.batch_size", "4", "--trainer.accelerator", "cpu", "--trainer.devices", str(world),
        "--trainer.max_epochs", "2", "--trainer.max_steps", "-1", "--trainer.limit_val_batches", "2",
        "--trainer.val_check_interval", "1.0", "--trainer.check_val_every_n_epoch", "1",
        "--trainer.limit_train_batches", "12", "--trainer.enable_progress_bar", "false",
        f"{NET}.attention_dropout", "0.1", f"{NET}.hidden_dropout", "0.1",
    ]  # fmt: skip
    whole, cut = [*args, "--name", "whole"], [*args, "--name", "cut"]
    assert run_ranks(main_of("lm"), whole, world=world, folder=work / "whole") == [0] * world, logs(work / "whole")
    killed = run_ranks(killed_main, "lm", cut, 7, world=world, folder=work / "killed")
    assert killed == [-signal.SIGKILL] * world, logs(work / "killed")
    last = work / "runs/lm/cut/checkpoints/last.ckpt"
    half = read_checkpoint(last)["global_step"]
    resumed = run_ranks(main_of("lm"), [*cut, "--ckpt_path", "last"], world=world, folder=work / "resumed")
    assert resumed == [0] * world, logs(work / "resumed")
    assert 0 < half < read_checkpoint(last)["global_step"]
    assert digest(last) == digest(work / "runs/lm/whole/checkpoints/last.ckpt")


@pytest.mark.matrix
@needs_megatron
@pytest.mark.parametrize("fault", ["kill_1", "sigterm_1"])
def test_every_rank_ends(fault: str, work: Path, lm_args: list[str]) -> None:
    """The other rank of a group is waited for in every layer."""
    args = [
        "fit", *PRESET, *lm_args, "--data.batch_size", "4", "--trainer.accelerator", "cpu", "--trainer.devices", "2",
        "--trainer.max_steps", "200", "--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false",
        "--config", str(write_config(work, {"every_n_train_steps": 5})),
    ]  # fmt: skip
    faults, expected = FAULTS[fault]
    assert run_ranks(faulty_main, "lm", args, faults, folder=work) == expected, logs(work)
    line = "another rank has ended (" if fault == "kill_1" else "SIGTERM to another rank after step"
    assert line in (work / "rank0.log").read_text().splitlines()[-1]
    path = work / "runs/lm/default/checkpoints/last.ckpt"
    end = read_checkpoint(path)["global_step"] + 2
    resumed = ["fit", "--ckpt_path", "last", "--trainer.max_steps", str(end)]
    assert run_ranks(main_of("lm"), resumed, folder=work) == [0, 0], logs(work)


def slices(path: Path) -> None:
    """What ranks have of each parameter, which are its pieces, and that they put them together again."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(1)
    config = MegatronConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=4, activation="swiglu"
    )
    net = causal_lm(config, 5)
    assert isinstance(net, MegatronLM)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.arange(p.numel()).view_as(p))
    sliced = net.sliced(mesh)
    assert net.num_parameters() > sliced.num_parameters() > net.num_parameters() // 2
    rank, sizes = dist.get_rank(), {}
    for (name, p), q in zip(sliced.named_parameters(), net.parameters(), strict=True):
        assert torch.equal(whole_of(p.detach(), p, mesh), q.detach()), name
        assert torch.equal(slice_of(q.detach(), p, mesh), p.detach()), name
        sizes[name.removeprefix("model.")] = p.numel() / q.numel() if is_sliced(p) else 1
    gate, up = net.get_parameter("model.decoder.layers.0.mlp.linear_fc1.weight").chunk(2)
    mine = sliced.get_parameter("model.decoder.layers.0.mlp.linear_fc1.weight")
    assert torch.equal(mine, torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]]))
    vocabulary = sliced.get_parameter("model.embedding.word_embeddings.weight")
    assert vocabulary.shape == (3, 8)
    assert rank == 0 or not vocabulary[-1].any()
    if rank == 0:
        torch.save(sizes, path)


@needs_megatron
def test_what_a_rank_has_of_each_parameter(work: Path) -> None:
    assert run_ranks(slices, work / "sizes.pt", folder=work) == [0, 0], logs(work)
    sizes = torch.load(work / "sizes.pt")
    whole = {name for name, size in sizes.items() if size == 1}
    norms = {name for name in sizes if "layernorm" in name}
    assert len(norms) == 6
    biases = {f"decoder.layers.0.{layer}.bias" for layer in ("self_attention.linear_proj", "mlp.linear_fc2")}
    assert whole == {*norms, *biases, "embedding.position_embeddings.weight"}
    assert {name: size for name, size in sizes.items() if size not in (0.5, 1)} == {
        "embedding.word_embeddings.weight": 0.6
    }


def keep_sums(args: list[str], path: Path) -> None:
    """Train, and keep this rank's weights as sums, of those that it shares with its group apart."""
    cli = main_of("lm")(args)
    sums = {name: p.double().sum().item() for name, p in cli.model.named_parameters()}
    shared = [name for name, p in cli.model.named_parameters() if not is_sliced(p)]
    torch.save((sums, shared), path.with_suffix(f".{cli.trainer.global_rank}"))


@needs_megatron
def test_ranks_agree_on_what_they_share(work: Path, lm_args: list[str]) -> None:
    """With dropout, of which a group has to draw the same places: two groups of two, after ten steps."""
    args = [
        "fit", *PRESET, *lm_args, "--data.batch_size", "4", "--trainer.accelerator", "cpu", "--trainer.devices", "4",
        "--trainer.max_steps", "10", "--trainer.limit_val_batches", "0", f"{NET}.attention_dropout", "0.1",
        f"{NET}.hidden_dropout", "0.1", "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip
    assert run_ranks(keep_sums, args, work / "sums", world=4, folder=work) == [0] * 4, logs(work)
    found, shared = zip(*(torch.load(work / f"sums.{rank}") for rank in range(4)), strict=True)
    assert found[0] == found[2]
    assert found[1] == found[3]
    assert len(shared[0]) > 10
    for name, value in found[0].items():
        assert (found[1][name] == value) == (name in shared[0]), name


@needs_megatron
def test_preflight(work: Path, lm_args: list[str]) -> None:
    """Bytes per rank: what is sliced by half, the rest whole."""
    found = {}
    for world in (1, 2):
        path = work / f"found{world}.pt"
        args = ["preflight", *PRESET, *lm_args, "--trainer.accelerator", "cpu", "--trainer.devices", str(world)]
        args += [*SINGLE] if world == 1 else []
        assert run_ranks(keep_found, args, path, world=1, folder=work) == [0], logs(work)
        found[world] = torch.load(path)
    assert found[1]["params"] == found[2]["params"]
    assert found[1]["activations"] == found[2]["activations"] > 0
    assert found[1]["weights"] == 4 * found[1]["params"] == found[1]["gradients"]
    whole = 32 * (512 + 2 * (2 * 2 + 1) + 2 * 2)  # positions, norms, biases where layers end
    assert found[2]["weights"] == pytest.approx(4 * (found[1]["params"] + whole) / 2, abs=4)


def keep_found(args: list[str], path: Path) -> None:
    found = main_of("lm")(args).trainer.found  # type: ignore[attr-defined]
    torch.save(
        {**found.memory._asdict(), "params": found.params, "activations": found.activations, "items": found.items}, path
    )


@needs_megatron
@pytest.mark.parametrize(
    ("flags", "line"),
    halved([
        (["--trainer.devices", "1"], "tensor_parallel: 2 is no divisor of 1 ranks"),
        ([f"{NET}.num_attention_heads", "1"], "model.config.num_attention_heads is 1, no multiple of 2"),
        ([f"{NET}.num_key_value_heads", "1"], "model.config.num_key_value_heads is 1, no multiple of 2"),
        ([f"{NET}.intermediate_size", "65"], "model.config.intermediate_size is 65, no multiple of 2"),
        ([f"{NET}.num_attention_heads", "3"], "num_attention_heads: 3 is no divisor of 32"),
        ([f"{NET}.activation", "relu"], "'relu' is not accepted"),
        ([f"{NET}.hidden", "4"], "no such argument of common.nets.megatron.MegatronConfig"),
        (["--data.context", "1024"], "exceeds max_position_embeddings 512"),
        (["--model.optimizer", "common.optim.MuonAdamW"], "model.optimizer: MuonAdamW needs whole tensors"),
        (["--model.compile", "true"], "model.compile: is nothing for Megatron's layers"),
        (["--trainer.precision", "16-mixed"], "trainer.precision: 16-mixed"),
        (["--trainer.precision", "bf16-mixed"], "trainer.precision: Megatron's layers have no autocast on a CPU"),
    ]),
)  # fmt: skip
def test_mistakes(flags: list[str], line: str, work: Path, lm_args: list[str]) -> None:
    devices = int(flags[1]) if flags[0] == "--trainer.devices" else 2
    args = ["fit", *PRESET, *TINY, *lm_args, "--trainer.accelerator", "cpu", "--trainer.devices", "2", *flags]
    assert run_ranks(main_of("lm"), args, world=devices, folder=work) == [2] * devices, logs(work)
    assert line in (work / "rank0.log").read_text().splitlines()[-1]
    assert not (work / "runs/lm/default/checkpoints").exists()


@needs_megatron
def test_a_net_of_other_layers(work: Path, lm_args: list[str]) -> None:
    args = [*PRESET, *TINY, "--model.config", "transformers.LlamaConfig", *lm_args, "--trainer.accelerator", "cpu"]
    for command, world in (("fit", 2), ("preflight", 1)):
        codes = run_ranks(main_of("lm"), [command, *args, "--trainer.devices", "2"], world=world, folder=work)
        assert codes == [2] * world, logs(work)
        line = "LlamaForCausalLM is no net of Megatron's layers; take common.nets.megatron.MegatronConfig"
        assert line in (work / "rank0.log").read_text().splitlines()[-1]
    assert not (work / "runs/lm/default/checkpoints").exists()


def test_fp16_is_refused() -> None:
    strategy = Megatron()
    strategy.parallel_devices = [torch.device("cpu")] * 2
    strategy._precision_plugin = SimpleNamespace(precision="16-mixed")  # type: ignore[assignment]  # which needs a GPU
    with pytest.raises(InputError, match=r"trainer.precision: 16-mixed overflows in one slice"):
        strategy.setup_environment()


@pytest.mark.skipif(installed, reason="megatron-core is installed")
def test_a_missing_package_is_named_with_its_command(work: Path, lm_args: list[str]) -> None:
    for command in ("fit", "preflight"):
        assert run_ranks(main_of("lm"), [command, *PRESET, *lm_args], world=1, folder=work) == [2], logs(work)
        last = (work / "rank0.log").read_text().splitlines()[-1]
        assert "megatron-core is not installed; run pip install -e '.[megatron]'" in last
