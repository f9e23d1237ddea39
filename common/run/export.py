"""A trained net for others: safetensors and what belongs to it."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from common.checkpoint import AtomicCheckpointIO, read_checkpoint, readable_facts
from common.checksums import CHECKSUMS, checksums
from common.data import BaseDataModule
from common.module import BaseModule
from common.sources.files import made_again
from common.weights import PARTS, inner_net

OF_TRAINING = "optimizer_states", "lr_schedulers", "callbacks", "loops"
OLD = ("class_names", "columns")  # which checkpoints of before have among the settings of the net

README = """# A net of the recipe {recipe}

In a clone of the repository, with EXPORT for this folder and `new.csv` for rows with or without the target:

```bash
python recipes/{recipe}/train.py predict --name exported --ckpt_path EXPORT/net.ckpt \\
  --data.predict_source {source} --data.predict_source.path new.csv
```

The command writes `runs/{recipe}/exported/predict-net/predictions.csv`. From Python:

```python
import pandas

from {module} import {name}

model = {name}.load_from_checkpoint("EXPORT/net.ckpt")
print(model.predict(pandas.read_csv("new.csv")))
```

`facts.json` says what the columns are, and by which class and arguments the net in `model.safetensors` was made.
"""


def export(model: BaseModule, datamodule: BaseDataModule, ckpt_path: str, folder: Path) -> None:
    """Write a checkpoint's net to a folder: safetensors, as ``from_pretrained`` reads it, and checksums of all files.

    ``facts.json`` says what its inputs and outputs mean: class names, columns and their encoding, shapes and range of
    images, length of texts; and of a net that transformers does not know by which class and arguments it was made. A
    head of our own on a net of transformers is in ``head.safetensors``. ``parts.safetensors`` has a hash of each sample
    of training, validation and test, by which a run that starts with the net sees whether it tests on what is known.
    A net of tables gets a ``net.ckpt`` and a ``README.md`` that says how to predict with it.

    Args:
        model: the module.
        datamodule: its data; its tokenizer is written beside the net.
        ckpt_path: the checkpoint.
        folder: where to; made anew.

    Raises:
        InputError: the checkpoint cannot be read.
    """
    from safetensors.torch import save_file, save_model
    from transformers import PreTrainedModel
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
    settings = checkpoint.get("hyper_parameters", {})
    facts = readable_facts(checkpoint.get("facts") or {k: v for k, v in settings.items() if k in OLD})
    classes = facts.get("class_names")
    tokenizer = _tokenizer(datamodule)
    if found := next((module for module in inner if isinstance(module, PreTrainedModel)), None):
        if classes and found.config.num_labels == len(classes):
            found.config.id2label = dict(enumerate(map(str, classes)))
            found.config.label2id = {str(name): number for number, name in enumerate(classes)}
            if checkpoint["hyper_parameters"].get("labels") == "several":
                found.config.problem_type = "multi_label_classification"
        if found.can_generate() and tokenizer is not None:
            for each in (found.config, found.generation_config):
                if each.eos_token_id is None:  # a net that generates nothing in training is not told
                    each.eos_token_id = tokenizer.eos_token_id
        found.save_pretrained(folder)
        place, _ = inner_net(net)
        rest = {name: values for name, values in net.state_dict().items() if not name.startswith(place)}
        if rest:  # a head of our own
            save_file(rest, folder / "head.safetensors")
        if scaling := getattr(net, "preprocessing", None):
            _, height, width = facts["shapes"]["pixel_values"]  # the net's own may crop, and have another size
            settings_of = {name: scaling[name] for name in ("image_mean", "image_std")} | {
                "image_processor_type": "ViTImageProcessor", "do_resize": True, "resample": 3, "do_normalize": True,
                "size": {"height": height, "width": width}, "do_rescale": True, "rescale_factor": 1 / 255,
            }  # fmt: skip
            (folder / "preprocessor_config.json").write_text(json.dumps(settings_of, indent=1), encoding="utf-8")
    else:
        save_model(net, str(folder / "model.safetensors"))
        facts["net"] = settings.get("net")
        if "columns" in facts:
            _write_table_net(checkpoint, model, datamodule, folder)
    if parts := checkpoint.get("facts", {}).get("parts"):
        save_file(dict(parts), folder / PARTS)
    (folder / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.iterdir():  # safetensors lets nobody else read what it writes
        path.chmod(0o666 & ~mask)
    written = sorted(path.name for path in folder.iterdir())
    (folder / CHECKSUMS).write_text(json.dumps(checksums(folder, written), indent=1), encoding="utf-8")
    print(f"export: {folder}", flush=True)


def _tokenizer(datamodule: Any) -> Any:
    """The tokenizer of the data in the form of transformers; None without texts."""
    from transformers import PreTrainedTokenizerFast

    if (tokenizer := getattr(datamodule, "tokenizer", None)) is not None:
        eos_id = getattr(datamodule, "eos_id", None)
        ends = tokenizer.id_to_token(eos_id) if eos_id is not None else None
        special = {"eos_token": ends, "pad_token": ends} if ends else {}
        if context := getattr(datamodule, "context", None):
            special["model_max_length"] = context
        special = datamodule.facts.get("special") or special  # a pretrained net's own
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    made_from = datamodule.facts.get("tokenizer")
    return made_again(made_from) if isinstance(made_from, Mapping) and made_from else None


def _write_table_net(checkpoint: Mapping[str, Any], model: BaseModule, datamodule: Any, folder: Path) -> None:
    """Write the checkpoint without what training alone needs, and how to predict with it."""
    kept = {name: value for name, value in checkpoint.items() if name not in OF_TRAINING}
    AtomicCheckpointIO().save_checkpoint(kept, folder / "net.ckpt")
    kind, source = type(model), type(datamodule.source)
    named = f"{source.__module__}.{source.__qualname__}" if source.__module__.startswith("common.") else source.__name__
    if source.__module__ == "common.sources.tables":
        named = "common.sources.tables.Table"  # bundled data have no path
    recipe = kind.__module__.split(".")[-2]
    text = README.format(recipe=recipe, source=named, module=kind.__module__, name=kind.__name__)
    (folder / "README.md").write_text(text, encoding="utf-8")
