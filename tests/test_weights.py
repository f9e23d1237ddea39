"""Weights from elsewhere: nets that transformers has saved, and runs of one's own, train further by flags."""

import csv
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from common.checkpoint import read_checkpoint
from common.nets import Pretrained
from tests.support import (
    EXACT,
    ROOT,
    TINY,
    difference,
    logs,
    main_of,
    read_metrics,
    refused,
    run_ranks,
    write_decoder,
    write_encoder,
    write_resnet,
)

FIT = [
    *TINY, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--trainer.log_every_n_steps", "1",
]  # fmt: skip
TEXT = ["--data.path", "my.txt", "--data.context", "32"]
# As of a run that ends where another goes on: its schedule depends on its length.
STEADY = ["--model.lr_scheduler", "null", "--last.every_n_train_steps", "2"]

pytestmark = pytest.mark.usefixtures("no_report")


def preset(recipe: str) -> list[str]:
    return ["fit", "--config", str(ROOT / f"recipes/{recipe}/pretrained.yaml"), *FIT]


@pytest.fixture
def text(work: Path, small_text: Path) -> str:
    found = small_text.read_text(encoding="utf-8")[:20_000]
    (work / "my.txt").write_text(found, encoding="utf-8")
    return found


@pytest.fixture
def photos(work: Path) -> Path:
    """Colour images of two kinds, told apart by their brightness."""
    for kind, name in enumerate(("cat", "dog")):
        (work / "photos" / name).mkdir(parents=True)
        for number in range(30):
            pixels = np.random.default_rng([kind, number]).integers(100 * kind, 100 * kind + 150, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(work / f"photos/{name}/{number}.png")
    return work / "photos"


IMAGES = ["--data.source.path", "photos", "--data.source.size", "16", "--data.batch_size", "4"]


def state_of(recipe: str, run: str, name: str = "last") -> dict[str, Any]:
    return read_checkpoint(f"runs/{recipe}/{run}/checkpoints/{name}.ckpt")


def same_state(*states: dict[str, Any]) -> bool:
    """Whether two checkpoints hold the same weights and the same state of the optimizer, to the bit."""
    torch.testing.assert_close(*[state["optimizer_states"] for state in states], rtol=0, atol=0)
    weights = [state["state_dict"] for state in states]
    return all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize(
    ("recipe", "kind", "frozen"),
    [
        ("lm", "LlamaConfig", 0),
        *(pytest.param("lm", kind, 0, marks=pytest.mark.matrix) for kind in ("GPT2Config", "Qwen3Config", "OPTConfig")),
        *(pytest.param("lm", kind, 1, marks=pytest.mark.matrix) for kind in ("GPT2Config", "GPTNeoXConfig")),
        pytest.param("lm", "LlamaConfig", 2, marks=pytest.mark.matrix),
        pytest.param("curriculum", "GPT2Config", 1, marks=pytest.mark.matrix),
    ],
)
def test_a_language_model_trains_further(
    recipe: str, kind: str, frozen: int, work: Path, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """With its own tokenizer, in fp32; resumed to the bit and exported when its folder and the text are gone."""
    folder = write_decoder(work / "net", text, kind, tokens=12, dtype="bfloat16")
    mine = AutoTokenizer.from_pretrained(folder)
    args = [*preset(recipe), *TEXT, *STEADY, "--model.weights", "./net", "--model.frozen_blocks", str(frozen)]
    args += ["--model.sample_tokens", "4"] if recipe == "lm" else []
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    capfd.readouterr()
    cli = main_of(recipe)([*args, "--name", "whole"])
    assert not capfd.readouterr().err
    assert type(cli.model.net) is type(start)
    assert {p.dtype for p in cli.model.net.parameters()} == {torch.float32}
    assert cli.datamodule.tokenizer.get_vocab() == mine.get_vocab()
    moved = {name for name, p in cli.model.net.named_parameters() if not torch.equal(p, start.get_parameter(name))}
    assert moved == {name for name, p in cli.model.net.named_parameters() if p.requires_grad}
    assert all(not part.training for part in cli.model.train().frozen)
    main_of(recipe)([*args, "--trainer.max_steps", "2"])
    shutil.rmtree(folder)
    main_of(recipe)(["fit", "--ckpt_path", "last", "--trainer.max_steps", "4"])
    assert same_state(state_of(recipe, "default"), state_of(recipe, "whole"))
    (work / "my.txt").unlink()
    cli = main_of(recipe)(["export"])
    there = AutoModelForCausalLM.from_pretrained(work / f"runs/{recipe}/default/export")
    ids = AutoTokenizer.from_pretrained(work / f"runs/{recipe}/default/export")("the import system").input_ids
    assert ids == mine("the import system").input_ids
    assert there.generation_config.eos_token_id == mine.eos_token_id
    with torch.no_grad():
        logits = [net(input_ids=torch.tensor([ids])).logits for net in (there, cli.model.net.eval())]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("net", "freeze"),
    [
        ("resnet", True),
        *(pytest.param(*case, marks=pytest.mark.matrix) for case in (("resnet", False), ("vit", True), ("vit", False))),
    ],
)
def test_an_image_net_trains_further(net: str, freeze: bool, work: Path, photos: Path) -> None:
    """With a new head, its own mean and scale; the body more slowly, or not at all."""
    if net == "resnet":
        write_resnet(work / "net")
    else:
        sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes |= {"intermediate_size": 16, "image_size": 16, "patch_size": 8, "num_labels": 7}
        config = transformers.ViTConfig(**sizes)
        transformers.ViTForImageClassification(config).save_pretrained(work / "net")
    start = AutoModelForImageClassification.from_pretrained(work / "net").base_model.state_dict()
    args = [*preset("classification"), *IMAGES, *STEADY, "--model.net.name", "./net"]
    args += ["--model.net.freeze", str(freeze).lower()]
    cli = main_of("classification")([*args, "--name", "whole"])
    body = cli.model.net.model.base_model
    same = [torch.equal(value, start[name]) for name, value in body.state_dict().items()]
    assert all(same) if freeze else not any(same[:2])
    assert body.training != freeze
    rates = {group["lr"] for group in cli.trainer.optimizers[0].param_groups}
    assert rates == ({1.0e-3} if freeze else {1.0e-3, 1.0e-4})
    main_of("classification")([*args, "--trainer.max_steps", "2"])
    shutil.rmtree(work / "net")
    main_of("classification")(["fit", "--ckpt_path", "last", "--trainer.max_steps", "4"])
    assert same_state(state_of("classification", "default"), state_of("classification", "whole"))
    cli = main_of("classification")(["export"])
    there = AutoModelForImageClassification.from_pretrained(work / "runs/classification/default/export")
    assert there.config.id2label == {0: "cat", 1: "dog"}
    images = torch.rand(3, 3, 16, 16)
    scaled = (images - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.2])[:, None, None]
    with torch.no_grad():
        logits = there(pixel_values=scaled if net == "resnet" else images).logits
        assert torch.allclose(logits, cli.model.net.eval()(pixel_values=images), atol=1e-6)
    assert (work / "runs/classification/default/export/preprocessor_config.json").exists() == (net == "resnet")
    if net == "resnet":  # a picture of another size is brought to that of the training
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
        processor = AutoImageProcessor.from_pretrained(work / "runs/classification/default/export")
        with torch.no_grad():
            found = there(**processor(picture, return_tensors="pt")).logits.softmax(-1)[0, 0].item()
        assert found == pytest.approx(cli.model.predict([picture])["p(cat)"][0], abs=1e-6)


@pytest.mark.matrix
@pytest.mark.parametrize("strategy", EXACT)
def test_ranks_start_with_the_same_weights(strategy: str, work: Path, text: str) -> None:
    """Of a folder, and of a run, under every strategy."""
    write_decoder(work / "net", text, tokens=6)
    args = [*preset("lm"), *TEXT, "--model.weights", "./net", "--model.sample_tokens", "0", "--trainer.max_steps", "3"]
    together = strategy in ("tensor_parallel", "pipeline")
    layer = ["--config", str(ROOT / f"configs/strategy/{strategy}.yaml"), "--trainer.devices", "2"]
    main_of("lm")([*args, "--data.batch_size", "8", "--name", "one"])
    main_of("lm")([*args, "--data.batch_size", "8", "--name", "further", "--init_from", "one"])
    for alone, more in (("one", []), ("further", ["--init_from", "one"])):
        ranks = [*args, *layer, "--data.batch_size", "8" if together else "4", "--name", f"{alone}_of_two", *more]
        codes = run_ranks(main_of("lm"), ranks, folder=work / "logs")
        assert codes == [0, 0], logs(work / "logs")
        losses = [read_metrics(work / f"runs/lm/{run}/metrics.csv", "train/loss") for run in (f"{alone}_of_two", alone)]
        assert len(losses[0]) == 3
        assert difference(*losses) < 1e-5


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.matrix)])
def test_a_run_starts_with_the_weights_of_another(
    whole: bool, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """By its name, its checkpoint or its export; with one command for each start of a job; to the bit."""
    args = ["fit", *FIT, "--config", str(ROOT / "recipes/classification/small.yaml"), *STEADY]
    main_of("classification")([*args, "--name", "base"])
    if whole:
        main_of("classification")(["export", "--name", "base"])
    best = "runs/classification/base/checkpoints/best.ckpt"
    weights = {
        name: p for name, p in state_of("classification", "base", "best")["state_dict"].items() if "net." in name
    }
    for start in ("runs/classification/base/export", best) if whole else (best,):
        cli = main_of("classification")([*args, "--init_from", start, "--model.optimizer.lr", "0"])
        assert "facts_of" not in cli.resolved["data"]
        assert cli.config.fit.data.facts_of == (None if start.endswith("export") else cli.resolved["init_from"])
        state = state_of("classification", "default")
        assert state["global_step"] == 4
        assert all(torch.equal(state["state_dict"][name], p) for name, p in weights.items())
    main_of("classification")([*args, "--init_from", "base", "--trainer.max_steps", "2"])
    again = [*args, "--init_from", "base", "--name", "whole", "--ckpt_path", "auto"]
    main_of("classification")(again)
    shutil.rmtree("runs/classification/base")
    main_of("classification")(["fit", "--ckpt_path", "last", "--trainer.max_steps", "4"])
    assert same_state(state_of("classification", "default"), state_of("classification", "whole"))
    kept = yaml.safe_load(Path("runs/classification/default/config.yaml").read_text())
    assert kept["init_from"] == str(Path(best).absolute())
    other = [*again, "--init_from", "other", "--trainer.max_steps", "6"]
    for given, line in (
        (["--init_from", "defalt"], "--init_from defalt: no run of this"),
        (["--init_from", "default"], "--init_from default: is of the run whose name this fit takes"),
        (other[len(args) :], "--init_from other: the run of --ckpt_path has begun with "),
    ):
        assert refused("classification", [*args, *given], capfd).startswith(line)


@pytest.mark.matrix
def test_a_layer_may_name_the_weights_of_another(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It decides about the facts too, and is for each start of a job; the run's config starts the same again."""
    main, small = main_of("classification"), ["--config", str(ROOT / "recipes/classification/small.yaml")]
    layer = {"init_from": "base", "ckpt_path": "auto", "data": {"facts_of": None}}
    Path("layer.yaml").write_text(yaml.safe_dump(layer))
    args = ["fit", *FIT, *small, "--config", "layer.yaml"]
    main(["fit", *FIT, *small, "--name", "base"])
    for steps in ("2", "4"):
        cli = main([*args, "--name", "next", "--trainer.max_steps", steps])
        assert (cli.trainer.global_step, cli.model.init_from is None) == (int(steps), steps == "4")
        assert cli.resolved["data"]["facts_of"] is None
    config = Path("runs/classification/next/config.yaml")
    again = main(["fit", "--config", str(config), "--name", "again", "--trainer.max_steps", "1"])
    assert again.model.init_from == str(Path("runs/classification/base/checkpoints/best.ckpt").absolute())
    assert again.config.fit.data.facts_of is None
    main(["test", "--name", "next"])
    line = refused("classification", [*args, "--name", "base"], capfd)
    assert line.endswith(
        "--init_from base: the run of --ckpt_path has begun with no such weights; leave it out, or begin another --name"
    )


def test_an_export_starts_a_run(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With its head, be it ours; a folder without one is refused, and so are other sizes than its config.json says."""
    texts = [f"a {'very ' * (number % 9)}{word} film {number}" for number in range(20) for word in ("good", "bad")]
    (work / "reviews.csv").write_text("\n".join(["text,label", *(f"{text},{'good' in text}" for text in texts)]))
    encoder = str(write_encoder(work / "encoder", texts))
    args = ["fit", "--config", str(ROOT / "recipes/classification/text.yaml"), *FIT, "--data.batch_size", "4"]
    args += ["--data.source.tokenizer", encoder, "--model.net.name", encoder]
    main_of("classification")([*args, "--name", "base"])
    main_of("classification")(["export", "--name", "base"])
    folder = "runs/classification/base/export"
    cli = main_of("classification")([*args, "--init_from", folder, "--model.optimizer.lr", "0"])
    net = state_of("classification", "base", "best")["state_dict"]
    assert all(torch.equal(p, net[f"net.{name}"]) for name, p in cli.model.net.state_dict().items())
    other = [*args, "--data.split_seed", "7", "--init_from"]
    line = refused("classification", [*other, folder], capfd)
    assert re.search(r"was trained on \d+ samples of this run's validation and test parts; give the run's checkp", line)
    main_of("classification")([*other, "base", "--data.facts_of", "null"])
    assert "samples of this run's validation and test parts, as data.facts_of is not" in capfd.readouterr().out
    small = ["fit", *FIT, "--config", str(ROOT / "recipes/classification/small.yaml"), "--init_from", "vit"]
    sizes = yaml.safe_load((ROOT / "recipes/classification/small.yaml").read_text())
    config = transformers.ViTConfig(**sizes["model"]["net"]["init_args"]["config"]["init_args"])
    transformers.ViTModel(config).save_pretrained(work / "vit")
    line = refused("classification", small, capfd)
    assert 'does not fit the net ImageClassifier: Missing key(s) in state_dict: "model.classifier.weight"' in line
    config.hidden_size = 16
    config.save_pretrained(work / "vit")
    assert "is no export of such a net (You set `ignore_mismatched_sizes`" in refused("classification", small, capfd)


def test_more_classes_get_a_new_head(work: Path, photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a run, whose samples stay in their parts, and of its weights alone; the run of more classes goes on."""
    main = main_of("classification")
    table = ["--data.source", "common.sources.ImageTable", "--data.source.size", "8", "--data.batch_size", "4"]
    args = ["fit", *FIT, *table, "--data.source.path", "photos", "--data.source.mode", "L"]
    args += ["--model.optimizer.lr", "0"]
    before = main([*args, "--name", "base"])
    shutil.copytree(photos / "cat", photos / "ant")
    for path in photos.glob("ant/*"):
        Image.open(path).rotate(90).save(path)
    state = state_of("classification", "base", "best")["state_dict"]
    for start, order in (([], ["cat", "dog", "ant"]), (["--data.facts_of", "null"], ["ant", "cat", "dog"])):
        capfd.readouterr()
        cli = main([*args, "--init_from", "base", *start])
        out = capfd.readouterr().out
        assert "has 2 classes and the data 3; the net gets a new head, " in out
        assert ("come after its own: 'ant'" in out) == (not start)
        assert cli.model.class_names == cli.datamodule.facts["class_names"] == order
        *body, _, _ = ((name, p) for name, p in cli.model.net.named_parameters())
        assert all(torch.equal(p, state[f"net.{name}"]) for name, p in body)
        if not start:
            knows = set(before.datamodule.facts["parts"]["keys"].tolist())
            old, new = (cli.datamodule.facts["parts"]["keys"] for cli in (before, cli))
            assert [key for key in new.tolist() if key in knows] == old.tolist()
            main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "5"])
            assert main(["test"]).model.class_names == order
    line = refused("classification", [*args, "--data.init_from", "base"], capfd)
    assert "data.init_from: is taken from init_from and cannot be set; remove it" in line
    shutil.move(photos / "dog", photos / "dogs")
    assert "not trained on a class 'ant'" in refused("classification", [*args, "--init_from", "base"], capfd)


@pytest.mark.matrix
def test_a_table_of_more_classes_gets_a_new_head(work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, kinds in (("two", "ab"), ("three", "cab")):
        rows = [f"{number % 17 + number / 100},{number % 7},{kind}" for number in range(60) for kind in kinds]
        (work / f"{name}.csv").write_text("\n".join(["size,price,kind", *rows]))
    args = ["fit", *FIT, "--config", str(ROOT / "recipes/classification/table.yaml"), "--data.batch_size", "8"]
    args += ["--data.source.label", "kind", "--model.net.d_block", "16", "--model.net.n_bins", "4"]
    args += ["--data.source.path"]
    main_of("classification")([*args, "two.csv", "--name", "base"])
    cli = main_of("classification")([*args, "three.csv", "--init_from", "base"])
    assert "has 2 classes and the data 3; the net gets a new head, net.output.bias, net.output.weight" in (
        capfd.readouterr().out
    )
    assert cli.model.class_names == ["a", "b", "c"]


@pytest.mark.matrix
def test_other_classes_and_shapes_are_told(work: Path, photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a run whose weights do not fit; other samples of the same classes are a choice."""
    small = ["--config", str(ROOT / "recipes/classification/small.yaml")]
    table = ["--data.source", "common.sources.ImageTable", "--data.source.size", "8", "--data.batch_size", "4"]
    table += ["--data.source.mode", "L"]
    args = ["fit", *FIT, *small, *table, "--data.source.path"]
    main_of("classification")([*args, "photos", "--name", "base"])
    start = ["--init_from", "base"]
    shutil.copytree(photos / "cat", work / "others/cow")
    shutil.copytree(photos / "dog", work / "others/dog")
    line = refused("classification", [*args, "others", *start], capfd)
    assert "the checkpoint was not trained on a class 'cow'" in line
    line = refused("classification", [*args, "others", *start, "--data.facts_of", "null"], capfd)
    assert "its classes have cat where those of the data have cow; give data with the same" in line
    line = refused("classification", [*args, "photos", *start, "--model.net.config.hidden_size", "16"], capfd)
    assert "does not fit the net ImageClassifier: size mismatch for model.vit.embeddings.cls_token" in line
    for path in photos.glob("*/*.png"):
        Image.open(path).rotate(90).save(path)
    line = refused("classification", [*args, "photos", *start], capfd)
    assert "they are others, or have changed; give those of the training, or give --data.facts_of null" in line
    main_of("classification")([*args, "photos", *start, "--data.facts_of", "null"])


def fewer(folder: Path, text: str) -> None:
    write_decoder(folder, text, tokens=-40)


def body_alone(folder: Path, text: str) -> None:
    write_decoder(folder, text)
    AutoModelForCausalLM.from_pretrained(folder).model.save_pretrained(folder)


def cut_short(folder: Path, text: str) -> None:
    file = write_decoder(folder, text) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-99])


def without_tokenizer(folder: Path, text: str) -> None:
    write_decoder(folder, text)
    for path in folder.glob("tokenizer*"):
        path.unlink()


BPE = "--data.tokenizer common.sources.tokenizers.BPE"
OTHER = "--data.tokenizer common.sources.tokenizers.PretrainedTokenizer --data.tokenizer.name other"
MISFITS: list[tuple[Callable[[Path, str], Any], str, str]] = [
    (write_decoder, BPE, "BPE is not the tokenizer of model.weights; add the recipe's pretrained.yaml by --config, or"),
    (write_decoder, "--model.config transformers.LlamaConfig", "model.weights have a configuration of their own"),
    (write_decoder, "--data.context 65", "65 exceeds max_position_embeddings 64 of model.weights './net'; shorten it"),
    (write_decoder, "--model.frozen_blocks 3", "must be 0 to 2, the blocks of this net"),
    (write_decoder, "--model.weight_init orthogonal", "would replace the weights of the net; set it to null"),
    (write_decoder, OTHER, "has another tokenizer, token "),
    (write_decoder, "--model.weights null", "data.tokenizer: is null, and there are no model.weights to take it from"),
    (fewer, "", "knows 260 tokens, and the data have 300; give its own tokenizer, or data.tokenizer null"),
    (body_alone, "", "its files lack lm_head.weight"),
    (cut_short, "", "neither a folder with a language model in safetensors nor a hub name"),
    (without_tokenizer, "", "no fast tokenizer there"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("write", "flags", "problem"),
    [case if n in (5, 7) else pytest.param(*case, marks=pytest.mark.matrix) for n, case in enumerate(MISFITS)],
)
def test_a_misfit_is_a_line(
    write: Callable[[Path, str], Any],
    flags: str,
    problem: str,
    work: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write(work / "net", text)
    if OTHER in flags:
        write_decoder(work / "other", "zyx " * 200)
    line = refused("lm", [*preset("lm"), *TEXT, "--model.weights", "./net", *flags.split()], capfd)
    assert problem in line


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--data.source.mode L", "takes images of 3 channels, and the data have 1; set data.source.mode"),
        pytest.param("--model.net.name ./nowhere", "neither a folder with such a net", marks=pytest.mark.matrix),
        pytest.param("--model.net.name my.txt", "neither a folder with such a net", marks=pytest.mark.matrix),
    ],
)
def test_an_image_misfit_is_a_line(
    flags: str,
    problem: str,
    work: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    write_resnet(work / "net")
    args = [*preset("classification"), *IMAGES, "--model.net.name", "./net", *flags.split()]
    assert problem in refused("classification", args, capfd)


def test_a_text_net_without_a_padding_token_takes_texts_of_several_lengths(work: Path) -> None:
    """It reads the class at the last token of each."""
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, eos_token_id=19, bos_token_id=19)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(work / "net")
    net = Pretrained(2, "net", task="text").eval()
    ids, mask = torch.tensor([[1, 2, 19, 19], [3, 4, 5, 6]]), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    alone = net(input_ids=ids[:1, :2], attention_mask=mask[:1, :2])
    torch.testing.assert_close(net(input_ids=ids, attention_mask=mask)[:1], alone)


@pytest.mark.matrix
def test_a_run_on_another_table_starts_with_the_weights_of_one(
    work: Path, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Of the same columns, whatever their means; the first other one is named."""
    for name, shift in (("one", 0), ("two", 5)):
        rows = [f"{number + shift * 10},{'ab'[number % 2]},{number % 7 + shift}" for number in range(60)]
        (work / f"{name}.csv").write_text("\n".join(["size,kind,price", *rows]))
    (work / "three.csv").write_text((work / "two.csv").read_text().replace(",b,", ",c,"))
    args = ["fit", *FIT, "--config", str(ROOT / "recipes/regression/small.yaml"), "--data.batch_size", "8"]
    args += ["--data.source", "common.sources.tables.Table", "--data.source.target", "price", "--data.source.path"]
    main_of("regression")([*args, "one.csv", "--name", "base"])
    start = ["--init_from", "base", "--data.facts_of", "null", "--model.weight_init", "null"]
    main_of("regression")([*args, "two.csv", *start])
    line = refused("regression", [*args, "three.csv", *start], capfd)
    assert "its columns have 'kind' (category 'b') where those of the data" in line


@pytest.mark.parametrize("recipe", ["regression", pytest.param("classification", marks=pytest.mark.matrix)])
def test_the_page_of_an_exported_table_net_predicts(
    recipe: str, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """By its command, and from Python, with nothing but the folder and the rows."""
    rows = [f"{number % 17},{'ab'[number % 2]},{number % 7}" for number in range(60)]
    (work / "old.csv").write_text("\n".join(["size,kind,price", *rows]))
    target, layer = ("price", "small.yaml") if recipe == "regression" else ("kind", "table.yaml")
    args = ["fit", *FIT, "--config", str(ROOT / f"recipes/{recipe}/{layer}"), "--data.batch_size", "8"]
    args += ["--model.net.n_bins", "4", "--model.net.d_block", "16"] if recipe == "classification" else []
    args += ["--data.source", "common.sources.tables.Table"] if recipe == "regression" else []
    name = "target" if recipe == "regression" else "label"
    main_of(recipe)([*args, "--data.source.path", "old.csv", f"--data.source.{name}", target])
    main_of(recipe)(["export"])
    there = work / "elsewhere/net"
    shutil.copytree(work / f"runs/{recipe}/default/export", there)
    shutil.rmtree(work / "runs")
    (work / "old.csv").rename(work / "new.csv")
    page = (there / "README.md").read_text().replace("EXPORT", str(there))
    command, code = re.findall(r"```\w+\n(.*?)```", page, re.DOTALL)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["python", f"recipes/{recipe}/train.py"]
    for _ in range(2):
        main_of(recipe)(words[2:])
    with (work / f"runs/{recipe}/exported/predict-net/predictions.csv").open() as file:
        written = [row["prediction"] for row in csv.DictReader(file)]
    found: dict[str, Any] = {}
    exec(code.replace("print(", "found = (").rstrip(), found)
    predicted = found["found"]["prediction"]
    assert len(written) == len(predicted) == 60
    assert (
        [f"{value:.5g}" for value in map(float, written)] == [f"{value:.5g}" for value in predicted]
        if (recipe == "regression")
        else written == predicted
    )


@pytest.mark.matrix
def test_a_config_alone_is_a_new_net_of_that_shape(work: Path, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    """For the tokens of the data; it goes on without the folder."""
    write_decoder(work / "net", text, tokens=99)
    for path in work.glob("net/*"):
        if path.name != "config.json":
            path.unlink()
    made = ["--data.tokenizer", "common.sources.tokenizers.BPE", "--data.tokenizer.vocab_size", "320"]
    args = [*preset("lm"), *TEXT, *STEADY, *made, "--model.weights", "./net", "--model.sample_tokens", "0"]
    net = main_of("lm")(args).model.net
    assert "model.weights ./net: has a config.json and no weights; the net is a new one" in capfd.readouterr().out
    assert (net.config.vocab_size, net.config.hidden_size) == (320, 32)
    shutil.rmtree(work / "net")
    main_of("lm")(["fit", "--ckpt_path", "last", "--trainer.max_steps", "6"])
    assert state_of("lm", "default")["global_step"] == 6


@pytest.mark.matrix
def test_students_and_teachers_begin_with_weights(work: Path, photos: Path) -> None:
    """A teacher with other classes is trained first, and anew with others."""
    write_resnet(work / "net")
    source = ["--data.source", "common.sources.ImageTable", *IMAGES, "--data.source.mode", "RGB"]
    args = ["fit", *FIT, *source, "--model.augmentation", "null", "--model.net", "common.nets.Pretrained"]
    args += ["--model.net.name", "./net", "--model.teacher", "common.nets.Pretrained", "--model.teacher.name", "./net"]
    (work / "layer.yaml").write_text(
        "data: {batch_size: 4}\nmodel: {augmentation: null}\ntrainer: {max_epochs: 1, check_val_every_n_epoch: 1}\n"
    )
    teachers = []
    for _ in range(2):
        cli = main_of("distillation")([*args, "--model.teacher_training", str(work / "layer.yaml")])
        teachers.append(cli.model.teacher_checkpoint)
        (work / "net/preprocessor_config.json").touch()
    assert teachers[0] != teachers[1]


def write_teacher(folder: Path, text: str) -> Path:
    """A Llama of other sizes than those of ``write_decoder``, with the same tokenizer."""
    write_decoder(folder, text)
    config = AutoModelForCausalLM.from_pretrained(folder).config
    config.num_hidden_layers = 3
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


STUDENT = ["--model.weights", "./net", "--model.teacher.name", "./large"]
WINDOWS = ["--data.source.path", "my.txt", "--data.source.context", "32"]


@pytest.mark.parametrize(
    ("kind", "frozen"), [("LlamaConfig", 0), pytest.param("GPT2Config", 1, marks=pytest.mark.matrix)]
)
def test_a_student_begins_with_a_language_model(kind: str, frozen: int, work: Path, text: str) -> None:
    """With its own tokenizer; resumed to the bit without its folder, and exported without the text too."""
    folder = write_decoder(work / "net", text, kind, tokens=12)
    write_teacher(work / "large", text)
    mine = AutoTokenizer.from_pretrained(folder)
    start: Any = AutoModelForCausalLM.from_pretrained(folder)
    main = main_of("distillation")
    args = [*preset("distillation"), *WINDOWS, *STUDENT, *STEADY, "--model.frozen_blocks", str(frozen)]
    cli = main([*args, "--model.body_lr_scale", "0.1", "--name", "whole"])
    net = cli.model.net.model
    assert type(net) is type(start)
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, start.get_parameter(name))}
    assert moved == {name for name, p in net.named_parameters() if p.requires_grad}
    assert (len(moved) < len(list(net.parameters()))) == bool(frozen)
    tied = start.get_output_embeddings().weight is start.get_input_embeddings().weight
    rates = {group["lr"] for group in cli.trainer.optimizers[0].param_groups}
    assert rates == ({0.1 * 5.0e-5} if tied else {5.0e-5, 0.1 * 5.0e-5})
    main([*args, "--model.body_lr_scale", "0.1", "--trainer.max_steps", "2"])
    shutil.rmtree(folder)
    main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "4"])
    assert same_state(state_of("distillation", "default"), state_of("distillation", "whole"))
    (work / "my.txt").rename(work / "new.txt")
    other = ["--data.predict_source", "TextWindows", "--data.predict_source.path", "new.txt"]
    data = main(["predict", *other, "--data.predict_source.context", "32"]).datamodule
    assert text.startswith(mine.decode(data.predict_data[[0]].inputs["input_ids"][0]))
    cli = main(["export"])
    place = work / "runs/distillation/default/export"
    there = AutoModelForCausalLM.from_pretrained(place)
    ids = AutoTokenizer.from_pretrained(place)("the import system").input_ids
    assert ids == mine("the import system").input_ids
    with torch.no_grad():
        logits = there(input_ids=torch.tensor([ids])).logits
        assert torch.equal(logits[..., :300], cli.model.net.eval()(input_ids=torch.tensor([ids])))
    assert there.config.vocab_size == 312


@pytest.mark.matrix
def test_the_student_alone_needs_no_folder(work: Path, text: str) -> None:
    """And while the folder is there, a text is tokenized once."""
    write_decoder(work / "net", text)
    write_teacher(work / "large", text)
    main, args = main_of("distillation"), [*preset("distillation"), *WINDOWS, *STUDENT, "--trainer.max_steps", "1"]
    args += ["--data.source.cache_dir", "texts"]
    main([*args, "--model.teacher", "null", "--name", "alone"])
    last = Path("runs/distillation/alone/checkpoints/last.ckpt").resolve()
    main([*args, "--model.alone_checkpoint", str(last)])
    main(["test", "--ckpt_path", "last"])
    assert len([path for path in (work / "texts").iterdir() if path.is_dir()]) == 1
    shutil.rmtree(work / "net")
    alone = main(["test", "--ckpt_path", "last"]).model.alone.net
    state = state_of("distillation", "alone")["state_dict"]
    assert all(torch.equal(value, state[f"net.{name}"]) for name, value in alone.state_dict().items())


@pytest.mark.matrix
@pytest.mark.parametrize("freeze", [True, False])
def test_a_student_begins_with_an_image_net(freeze: bool, work: Path, photos: Path) -> None:
    write_resnet(work / "net")
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 2}
    config = transformers.ResNetConfig(**sizes)
    transformers.ResNetForImageClassification(config).save_pretrained(work / "large")
    main, start = main_of("distillation"), AutoModelForImageClassification.from_pretrained(work / "net").base_model
    args = ["fit", "--config", str(ROOT / "recipes/distillation/pretrained_images.yaml"), *FIT, *IMAGES, *STEADY]
    args += ["--model.net.name", "./net", "--model.teacher.name", "./large", "--model.teacher_training", "null"]
    args += ["--model.net.freeze", str(freeze).lower()]
    cli = main([*args, "--name", "whole"])
    body = cli.model.net.model.base_model.state_dict()
    same = [torch.equal(value, body[name]) for name, value in start.state_dict().items()]
    assert all(same) if freeze else not any(same[:2])
    rates = {group["lr"] for group in cli.trainer.optimizers[0].param_groups}
    assert rates == ({1.0e-3} if freeze else {1.0e-3, 1.0e-4})
    main([*args, "--trainer.max_steps", "2"])
    shutil.rmtree(work / "net")
    main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "4"])
    assert same_state(state_of("distillation", "default"), state_of("distillation", "whole"))
    cli = main(["export"])
    there, images = (
        AutoModelForImageClassification.from_pretrained(cli.model.run_dir / "export"),
        torch.rand(3, 3, 16, 16),
    )
    scaled = (images - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.2])[:, None, None]
    with torch.no_grad():
        assert torch.allclose(there(scaled).logits, cli.model.net.eval()(pixel_values=images), atol=1e-6)


@pytest.mark.matrix
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("kind", ["texts", "images"])
def test_ranks_start_with_the_same_student(kind: str, strategy: str, work: Path, text: str, photos: Path) -> None:
    if kind == "texts":
        write_decoder(work / "net", text, tokens=6)
        write_teacher(work / "large", text)
        args = [*preset("distillation"), *WINDOWS, *STUDENT]
    else:  # a ViT: batch norm sees the samples of a rank alone
        sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 2}
        # Wide weights, by which the two differ. A loss near 0 would hold few digits.
        sizes |= {"intermediate_size": 16, "image_size": 16, "patch_size": 8, "initializer_range": 0.5}
        for name in ("net", "large"):
            transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)).save_pretrained(work / name)
        args = ["fit", "--config", str(ROOT / "recipes/distillation/pretrained_images.yaml"), *FIT, *IMAGES]
        args += ["--model.net.name", "./net", "--model.teacher.name", "./large", "--model.teacher_training", "null"]
        args += ["--model.augmentation", "null"]
    layer = ["--config", str(ROOT / f"configs/strategy/{strategy}.yaml"), "--trainer.devices", "2"]
    main_of("distillation")([*args, "--data.batch_size", "8", "--name", "one"])
    codes = run_ranks(
        main_of("distillation"), [*args, *layer, "--data.batch_size", "4", "--name", "two"], folder=work / "logs"
    )
    assert codes == [0, 0], logs(work / "logs")
    both = [read_metrics(work / f"runs/distillation/{run}/metrics.csv", "train/loss") for run in ("two", "one")]
    assert len(both[0]) == 4
    assert difference(*both) < 1e-5


def other_teacher(folder: Path, text: str) -> None:
    write_decoder(folder, text)
    write_decoder(folder.parent / "large", text.upper())


BESIDE = "--data.source.tokenizer common.sources.tokenizers.PretrainedTokenizer --data.source.tokenizer.name large"
STUDENT_MISFITS: list[tuple[Callable[[Path, str], Any], str, str]] = [
    (fewer, "", "model.weights: './net': knows 260 tokens, and the data have 300"),
    (other_teacher, "", "model.teacher.name: './large': has another tokenizer, token "),
    (other_teacher, BESIDE, "model.weights: './net': has another tokenizer, token "),
    (write_decoder, BPE.replace("data", "data.source", 1), "BPE is not the tokenizer of model.weights"),
    (write_decoder, "--data.source.context 65", "data.source.context: 65 exceeds max_position_embeddings 64 of "),
    (write_decoder, "--model.frozen_blocks 3", "model.frozen_blocks: 3: must be 0 to 2, the blocks of this net"),
    (write_decoder, "--model.weights null", "data.source.tokenizer: is null, and there are no model.weights to"),
    (write_decoder, "--model.net common.nets.ConvNet", "model.net: model.weights are a net of their own; add "),
    (write_decoder, "--data.source common.sources.Digits", "model.weights: is for texts of TextWindows, not for Dig"),
    (body_alone, "", "its files lack lm_head.weight"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("write", "flags", "problem"),
    [case if not n else pytest.param(*case, marks=pytest.mark.matrix) for n, case in enumerate(STUDENT_MISFITS)],
)
def test_a_student_that_does_not_fit_is_a_line(
    write: Callable[[Path, str], Any],
    flags: str,
    problem: str,
    work: Path,
    text: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_teacher(work / "large", text)
    write(work / "net", text)
    assert problem in refused("distillation", [*preset("distillation"), *WINDOWS, *STUDENT, *flags.split()], capfd)
