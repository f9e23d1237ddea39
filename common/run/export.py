"""A trained net for others: safetensors and what belongs to it."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from common.checkpoint import read_checkpoint
from common.checksums import CHECKSUMS, checksums
from common.data import BaseDataModule
from common.module import BaseModule


def export(model: BaseModule, datamodule: BaseDataModule, ckpt_path: str, folder: Path) -> None:
    """Write a checkpoint's net to a folder: safetensors, as ``from_pretrained`` reads it, and checksums of all files.

    Args:
        model: the module.
        datamodule: its data; its tokenizer is written beside the net, as is what encodes the columns of a table.
        ckpt_path: the checkpoint.
        folder: where to; made anew.

    Raises:
        InputError: the checkpoint cannot be read.
    """
    from safetensors.torch import save_model
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it stands on stderr
    model.float8 = False  # weights are the same without, and other machines have no float8
    model.of_checkpoint = ckpt_path
    model.configure_model()
    checkpoint = read_checkpoint(ckpt_path)
    model.load_state_dict(checkpoint["state_dict"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    net: nn.Module = model.net
    # A classifier of common.nets holds the net of transformers that others can load.
    inner = [net, *net.children()]
    classes = checkpoint.get("hyper_parameters", {}).get("class_names")
    if found := next((module for module in inner if isinstance(module, PreTrainedModel)), None):
        if classes and found.config.num_labels == len(classes):
            found.config.id2label = dict(enumerate(map(str, classes)))
            found.config.label2id = {str(name): number for number, name in enumerate(classes)}
        found.save_pretrained(folder)
        if settings := getattr(net, "preprocessing", None):
            (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    else:
        save_model(net, str(folder / "model.safetensors"))
    if columns := checkpoint.get("hyper_parameters", {}).get("columns"):
        (folder / "columns.json").write_text(json.dumps(columns, indent=1), encoding="utf-8")
    if classes:
        (folder / "classes.json").write_text(json.dumps(classes, indent=1), encoding="utf-8")
    if (tokenizer := getattr(datamodule, "tokenizer", None)) is not None:
        eos_id = getattr(datamodule, "eos_id", None)
        ends = tokenizer.id_to_token(eos_id) if eos_id is not None else None
        special = {"eos_token": ends, "pad_token": ends} if ends else {}
        if context := getattr(datamodule, "context", None):
            special["model_max_length"] = context
        special = datamodule.facts.get("special") or special  # a pretrained net's own
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    elif isinstance(made_from := datamodule.facts.get("tokenizer"), Mapping) and made_from:
        special = {name: value for name, value in made_from.items() if name != "json"}
        tokenizer = Tokenizer.from_str(made_from["json"])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    written = sorted(path.name for path in folder.iterdir())
    (folder / CHECKSUMS).write_text(json.dumps(checksums(folder, written), indent=1), encoding="utf-8")
    print(f"export: {folder}", flush=True)
