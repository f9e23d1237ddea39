"""``preflight`` tells the bytes that a run then holds, and ``export`` writes a net that computes the same elsewhere."""

import gc
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.checkpoint import read_checkpoint
from tests.support import INEXACT, ROOT, STRATEGIES, TINY, TOGETHER, logs, main_of, run_ranks

pytestmark = pytest.mark.usefixtures("no_report")

SIZE = "--model.config.init_args"
NETS = {
    "llama": [f"{SIZE}.hidden_size=256", f"{SIZE}.intermediate_size=512", f"{SIZE}.num_hidden_layers=4"],
    "gpt2": [
        "--model.config", "transformers.GPT2Config", f"{SIZE}.n_embd=192", f"{SIZE}.n_layer=3", f"{SIZE}.n_head=4",
        "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr=0.1", "--model.optimizer.momentum=0.9",
    ],
    "vit": ["--model.augmentation", "null", "--model.net", json.dumps({
        "class_path": "common.nets.ImageClassifier",
        "init_args": {"config": {
            "class_path": "transformers.ViTConfig",
            "init_args": {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 128,
                          "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512},
        }},
    })],
}  # fmt: skip


def live_bytes() -> int:
    """Bytes of all tensors of this process, each storage once."""
    gc.collect()
    found: dict[int, int] = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter):  # no subclasses: fake ones, and those that hold others
            for tensor in (item, item.grad if item.is_leaf else None):
                if isinstance(tensor, torch.Tensor) and type(tensor) in (torch.Tensor, torch.nn.Parameter):
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    found.pop(0, None)  # tensors without memory
    return sum(found.values())


def measured_main(recipe: str, args: list[str], path: Path) -> None:
    """Train, and measure when gradients and the optimizer's state are there."""
    from common.module import BaseModule

    before = BaseModule.on_before_optimizer_step

    def measure(self: BaseModule, optimizer: Any) -> None:
        before(self, optimizer)
        if self.trainer.global_step == 2 and self.trainer.is_global_zero:
            seen = []
            for _ in range(5):  # threads that communicate let go of their buffers a moment later
                seen.append(live_bytes())
                time.sleep(0.1)
            path.write_text(str(min(seen)))

    start = live_bytes()
    BaseModule.on_before_optimizer_step = measure  # type: ignore[method-assign]  # in this forked process only
    cli = main_of(recipe)(args)
    if cli.trainer.is_global_zero:
        path.write_text(json.dumps([int(path.read_text()) - start, cli.model.num_params]))


def preflight_main(recipe: str, args: list[str], path: Path) -> None:
    """Keep what preflight finds."""
    cli = main_of(recipe)(args)
    assert all(isinstance(p, FakeTensor) for p in cli.model.net.parameters())
    path.write_text(json.dumps({**cli.trainer.found._asdict(), "memory": sum(cli.trainer.found.memory)}))


CELLS = [
    *((net, strategy, "fp32") for net in NETS for strategy in STRATEGIES),
    *(("llama", strategy, precision) for strategy in STRATEGIES for precision in ("bf16-mixed", "bf16-true")),
]
CELLS.remove(("llama", "fsdp", "bf16-mixed"))  # needs a GPU
CELLS = [cell for cell in CELLS if cell[0] == "llama" or cell[1] not in TOGETHER]
FAST = {  # in fp32 those that shard or slice
    *(
        (list(NETS)[(i - 1) % len(NETS) * (name not in TOGETHER)], name, "fp32")
        for i, name in enumerate(STRATEGIES)
        if name in ("fsdp2", "deepspeed_zero3", "pipeline")
    ),
    ("llama", "deepspeed_zero2", "bf16-mixed"),
}


@pytest.mark.parametrize(
    ("net", "strategy", "precision"),
    [pytest.param(*cell, marks=[] if cell in FAST else pytest.mark.matrix) for cell in CELLS],
)
def test_preflight_tells_what_a_run_holds(
    net: str, strategy: str, precision: str, work: Path, lm_args: list[str], record_property: Any
) -> None:
    recipe = "classification" if net == "vit" else "lm"
    sizes = lm_args[: lm_args.index(f"{SIZE}.hidden_size")] if recipe == "lm" else []
    args = [
        "--config", str(ROOT / f"configs/strategy/{strategy}.yaml"),
        "--config", str(ROOT / f"configs/precision/{precision}.yaml"), *sizes, *NETS[net], "--data.batch_size", "4",
        "--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.max_steps", "3",
        "--trainer.limit_val_batches", "0", "--trainer.enable_progress_bar", "false", *INEXACT.get(strategy, []),
    ]  # fmt: skip
    told, seen = work / "told", work / "seen"
    assert run_ranks(preflight_main, recipe, ["preflight", *args], told, world=1, folder=work) == [0], logs(work)
    assert not (work / "runs").exists()
    assert run_ranks(measured_main, recipe, ["fit", *args], seen, folder=work) == [0, 0], logs(work)
    found, (measured, params) = json.loads(told.read_text()), json.loads(seen.read_text())
    assert found["params"] == params
    off = found["memory"] / measured - 1
    record_property(
        "summary", f"{net}, {strategy}, {precision}: {found['memory']:,} bytes told, {measured:,} held ({off:+.1%})"
    )
    assert abs(off) < 0.1
    assert found["ranks"] == 2
    assert found["steps"] == 3
    samples = 4 * 2 // TOGETHER.get(strategy, 1)
    assert found["items"] == (samples * 32 if recipe == "lm" else samples)
    assert found["activations"] > 0


def test_export_of_a_language_model_loads_elsewhere(
    work: Path, lm_args: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Logits and tokens of what transformers loads are those of the run; nothing goes to stderr."""
    main = main_of("lm")
    main(["fit", *lm_args, *TINY])
    capsys.readouterr()
    cli = main(["export"])
    assert not capsys.readouterr().err
    net = AutoModelForCausalLM.from_pretrained(work / "runs/lm/default/export").eval()
    tokenizer = AutoTokenizer.from_pretrained(work / "runs/lm/default/export")
    ids = cli.datamodule.tokenizer.encode("the import system").ids
    assert tokenizer("the import system")["input_ids"] == ids
    with torch.no_grad():
        logits = [module(input_ids=torch.tensor([ids])).logits for module in (net, cli.model.net.eval())]
    assert torch.equal(*logits)


def test_export_of_another_net_is_safetensors(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main = main_of("classification")
    main(["fit", *TINY])
    main(["export", "--ckpt_path", "last"])
    exported = load_file(work / "runs/classification/default/export/model.safetensors")
    state = read_checkpoint(work / "runs/classification/default/checkpoints/last.ckpt")["state_dict"]
    net = {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}
    assert exported.keys() == net.keys()
    assert all(torch.equal(exported[name], value) for name, value in net.items())


def test_export_needs_a_checkpoint(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main_of("classification")(["export"])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--ckpt_path: there is no best checkpoint; run fit first" in line
