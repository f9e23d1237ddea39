"""``preflight`` tells the bytes that a run then holds, and ``export`` writes a net that computes the same elsewhere."""

import gc
import json
import shutil
import time
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from common.checkpoint import read_checkpoint
from common.checksums import CHECKSUMS
from tests.support import (
    INEXACT,
    KIND,
    MEASURED,
    ROOT,
    STRATEGIES,
    TEXT,
    TINY,
    TOGETHER,
    logs,
    main_of,
    refused,
    run_ranks,
    small_args,
    tokens_until_the_end,
    write_encoder,
)

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
        if name in ("fsdp2", "pipeline")
    ),
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
    there = load_file(work / "runs/classification/default/export/model.safetensors")
    state = read_checkpoint(work / "runs/classification/default/checkpoints/last.ckpt")["state_dict"]
    net = {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}
    assert there.keys() == net.keys()
    assert all(torch.equal(there[name], value) for name, value in net.items())


def exported(recipe: str, args: list[str]) -> tuple[Any, Path, dict[str, Any]]:
    """Fit and export; the data module, the folder, and the facts in it."""
    main_of(recipe)(["fit", *TINY, "--trainer.enable_progress_bar", "false", *args])
    cli, folder = main_of(recipe)(["export"]), Path(f"runs/{recipe}/default/export")
    facts = json.loads((folder / "facts.json").read_text())
    assert facts.items() >= json.loads((folder.parent / "facts.json").read_text()).items()
    return cli, folder, facts


def test_a_stranger_classifies_images(work: Path) -> None:
    """With transformers alone, and with torch alone."""
    vit = ["--config", str(ROOT / "recipes/classification/small.yaml")]
    cli, folder, facts = exported("classification", vit)
    net = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert facts["class_names"] == [net.config.id2label[number] for number in range(10)] == [*map(str, range(10))]
    assert facts["shapes"] == {"pixel_values": [1, 8, 8]}
    assert facts["range"] == [0, 1]
    assert sum(facts["parts"].values()) == 1797
    images = torch.rand(5, *facts["shapes"]["pixel_values"])
    found = cli.model.predict(images)
    with torch.no_grad():
        probabilities = net(pixel_values=images).logits.softmax(-1)
    assert torch.equal(probabilities, torch.tensor([found[f"p({name})"] for name in facts["class_names"]]).T)

    cli, folder, facts = exported("classification", ["--model.net.widths", "[4]"])
    assert facts["net"]["init_args"] == {"in_channels": 1, "widths": [4], "dropout": 0.2, "grid": 1}
    layers: list[nn.Module] = []
    for before in (1, 4):
        layers += [nn.Conv2d(before, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    plain = nn.Sequential(
        *layers, nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(4, 10)
    )
    plain.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        probabilities = plain.eval()(images).softmax(-1)
    found = cli.model.predict(images)
    assert torch.equal(probabilities, torch.tensor([found[f"p({name})"] for name in facts["class_names"]]).T)


def test_a_stranger_classifies_texts(work: Path) -> None:
    """The mean of the token vectors goes through the head."""
    texts = [f"a {'very ' * (number % 3)}{word} film" for number in range(30) for word in ("good", "bad")]
    Path("reviews.csv").write_text("\n".join(["text,label", *(f"{text},{text.split()[-2]}" for text in texts)]))
    encoder = str(write_encoder(work / "encoder", texts))
    args = ["--config", str(ROOT / "recipes/classification/text.yaml"), "--data.source.path", "reviews.csv"]
    args += ["--data.source.tokenizer", encoder, "--model.net.name", encoder, "--data.source.max_length", "5"]
    cli, folder, facts = exported("classification", args)
    shutil.rmtree(encoder)
    assert facts["class_names"] == ["bad", "good"]
    assert facts["tokenizer"]["model_max_length"] == 5
    tokenizer, body = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    head = load_file(folder / "head.safetensors")
    new = ["good", "a bad film, and a very very long one"]
    inputs = tokenizer(new, truncation=True, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"][..., None].float()
    with torch.no_grad():
        states = body(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
        logits = (states * mask).sum(1) / mask.sum(1) @ head["head.1.weight"].T + head["head.1.bias"]
    found = cli.model.predict(new)
    torch.testing.assert_close(logits.softmax(-1).T.tolist(), [found["p(bad)"], found["p(good)"]])


def test_a_stranger_predicts_rows(work: Path) -> None:
    """Encodes them by the file alone: numbers by their quantiles, categories by their place, gaps as a class more."""
    generator = np.random.default_rng(0)
    frame = pandas.DataFrame({"size": generator.normal(size=200), "kind": ["ape", "bee"] * 100})
    frame["y"] = frame["size"] + 2 * (frame["kind"] == "bee")
    frame.loc[::9, "size"] = None
    frame.to_csv("rows.csv", index=False)
    args = [
        "--data.source",
        "common.sources.tables.Table",
        "--data.source.path",
        "rows.csv",
        "--data.source.target",
        "y",
    ]
    net = ["--model.net", "common.nets.tables.MLP", "--model.net.d_block", "8", "--model.net.n_blocks", "1"]
    cli, folder, facts = exported("regression", [*args, *net, "--data.source.target_unit", "1"])
    state, columns = load_file(folder / "model.safetensors"), facts["columns"]
    assert facts["net"]["class_path"] == "common.nets.tables.MLP"
    new = [{"size": 0.3, "kind": "bee"}, {"size": None, "kind": "ape"}, {"size": -0.1, "kind": "cow"}]
    encoded = []
    for row in new:
        numeric, kinds = columns["numeric"]["size"], columns["categorical"]["kind"]
        value = numeric["median"] if row["size"] is None else row["size"]
        quantiles = numeric["quantiles"]
        scaled = NormalDist().inv_cdf(float(np.interp(value, quantiles, np.linspace(0, 1, len(quantiles)))))
        one_hot = [row["kind"] not in kinds, row["kind"] is None, *(row["kind"] == name for name in kinds)]
        encoded.append([scaled, *one_hot, row["size"] is not None, row["size"] is None])
    hidden = torch.tensor(encoded).float() @ state["net.blocks.0.linear.weight"].T + state["net.blocks.0.linear.bias"]
    output = hidden.relu() @ state["net.output.weight"].T + state["net.output.bias"]
    predictions = output[:, 0] * columns["std"][0] + columns["mean"][0]
    torch.testing.assert_close(predictions.tolist(), cli.model.predict(new)["prediction"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(name, marks=[] if KIND[name] in ("MultiTask", "Curriculum") else pytest.mark.matrix)
        for name in MEASURED
    ],
)
def test_every_export_says_what_it_takes_and_gives(recipe: str, work: Path, small_text: Path) -> None:
    more = ["--model.teacher", "null"] if recipe == "distillation" else []
    _, folder, facts = exported(recipe, [*small_args(recipe, small_text), *more])
    if recipe in TEXT:
        assert facts["context"] == json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"]
        assert tokens_until_the_end(folder) == 1
    elif recipe == "regression":
        assert facts["columns"]["targets"] == ["progression"]
    else:
        assert facts["class_names"] == [str(number) for number in range(10)]
        assert facts["shapes"] == {"pixel_values": [1, 8, 8]}
    if recipe == "multitask":
        assert [task["name"] for task in facts["tasks"]] == ["left", "right", "offset"]
        assert facts["canvas"] == 14
    assert set(json.loads((folder / CHECKSUMS).read_text())) == {each.name for each in folder.iterdir()} - {CHECKSUMS}


def test_export_needs_a_checkpoint(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = refused("classification", ["export", "--ckpt_path", "null"], capfd)
    assert line == "--ckpt_path: export takes no net as it is made; give best, last or a file"
