"""Hostile input: nothing runs, nothing outside is read or written, no secret is written down."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from common.checkpoint import read_checkpoint
from common.errors import InputError
from common.run.environment import without_secrets
from common.run.folder import RunFolder
from tests.support import refused

SECRET = "canary-5f1d0c"


class Payload:
    """Makes a file named ``canary`` when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch canary",)


@pytest.fixture
def canary(work: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing may make the file that every payload makes, nor train."""

    def train(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a hostile input was accepted")

    monkeypatch.setattr(L.Trainer, "fit", train)
    yield
    assert not list(work.rglob("canary"))
    assert not Path("canary").exists()


# Configs

CALLS = [
    "os.system",
    "posix.system",
    "subprocess.Popen",
    "subprocess.run",
    "builtins.exec",
    "builtins.eval",
    "builtins.__import__",
    "functools.partial",
    "runpy.run_path",
    "pickle.loads",
    "importlib.import_module",
    "torch.os.system",
    "torch.hub.load",
    "torch.load",
    "torch.serialization.pickle.loads",
    "torch.utils.cpp_extension.load_inline",
    "torch.utils.cpp_extension.subprocess.run",
    "torch.nn.Module.__init__.__globals__",
    "torch.distributed.subprocess.run",
    "lightning.pytorch.trainer.trainer.os.system",
    "lightning.pytorch.utilities.os.system",
    "lightning.pytorch.loggers.csv_logs.os.system",
    "common.run.environment.subprocess.run",
    "common.checkpoint.os.system",
    "common.checkpoint.pickle.loads",
    "recipes.classification.train.sys.exit",
    "transformers.utils.import_utils.subprocess.run",
]
PLACES = ["model.optimizer", "model.net", "data.source", "trainer.callbacks", "trainer.logger", "trainer.strategy"]
INIT_ARGS = {"command": "touch canary", "args": "touch canary", "source": "open('canary', 'w')"}


@pytest.mark.parametrize(("number", "path"), list(enumerate(CALLS)), ids=CALLS)
def test_a_config_calls_nothing(
    number: int, path: str, work: Path, canary: None, capfd: pytest.CaptureFixture[str]
) -> None:
    place = PLACES[number % len(PLACES)]
    node: Any = {"class_path": path, "init_args": INIT_ARGS}
    node = [node] if place == "trainer.callbacks" else node
    for key in reversed(place.split(".")):
        node = {key: node}
    Path("hostile.yaml").write_text(yaml.safe_dump(node))
    refused("classification", ["fit", "--config", "hostile.yaml"], capfd)


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
YAMLS = {
    "apply": "model: !!python/object/apply:os.system ['touch canary']",
    "new": "model: !!python/object/new:os.system ['touch canary']",
    "object": "model: !!python/object:subprocess.Popen {args: touch canary}",
    "name": "model: !!python/name:os.system",
    "module": "model: !!python/module:os",
    "tuple": "model: !!python/tuple [1, 2]",
    "tag": "model: !system touch canary",
    "laughs": LAUGHS,
    "laughs_in_a_key": LAUGHS + "model: {net: *a11}",
    "depth": "model: " + "[" * 5000 + "]" * 5000,
    "depth_of_maps": "model: " + "{a: " * 2000 + "1" + "}" * 2000,
    "endless": "model: &a {net: *a}",
    "merge": "a: &a {b: 1}\nmodel: {<<: *a}",
    "nul": "model: \0",
    "escape": 'model: {"\\e[2Jx": 1}',
    "return": 'model: {"x\\rclassification: all is well": 1}',
    "dunder": "model: {__class__: os.system}",
    "include": "config: /etc/passwd",
    "no_mapping": "- model",
}


@pytest.mark.parametrize("kind", YAMLS)
def test_yaml_is_only_data(kind: str, work: Path, canary: None, capfd: pytest.CaptureFixture[str]) -> None:
    Path("hostile.yaml").write_text(YAMLS[kind])
    line = refused("classification", ["fit", "--config", "hostile.yaml"], capfd)
    assert line.isprintable()


# Checkpoints


def archive(*entries: tuple[str, bytes]) -> bytes:
    """A zip archive."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made:
        for name, data in entries:
            made.writestr(name, data)
    return file.getvalue()


def saved(value: Any) -> bytes:
    """The bytes of a checkpoint."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


WHOLE = {"state_dict": {}, "global_step": 1}
FILES = {
    "pickle": pickle.dumps(Payload()),
    "pickle_in_archive": archive(("a/data.pkl", pickle.dumps(Payload())), ("a/version", b"3\n")),
    "object": saved(WHOLE | {"facts": Payload()}),
    "object_beside": saved(WHOLE | {"hyper_parameters": {"_instantiator": Payload()}}),
    "climbs": archive(("../canary", b"x"), ("a/data.pkl", b"x")),
    "absolute": archive(("/tmp/canary", b"x"), ("a/data.pkl", b"x")),
    "bomb": archive(("a/data.pkl", bytes(50_000_000)), ("a/version", b"3\n")),
    "empty": b"",
    "text": b"canary",
    "list": saved([1]),
    "no_steps": saved({"state_dict": {}}),
    "script": archive(("a/code/__torch__.py", b"import os"), ("a/data.pkl", b"x"), ("a/constants.pkl", b"x")),
    "global": b"cos\nsystem\n(S'touch canary'\ntR.",
    "legacy": pickle.dumps(0x1950A86A20F9469CFC6C) + pickle.dumps(1001) + pickle.dumps({}) + pickle.dumps(Payload()),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_checkpoint_is_only_data(kind: str, work: Path, canary: None) -> None:
    Path("a.ckpt").write_bytes(FILES[kind])
    with pytest.raises(InputError) as error:
        read_checkpoint("a.ckpt")
    assert len(str(error.value).splitlines()) == 1


# Names

NAMES = ["../x", "../../x", "/tmp/x", "a/b", "a/../../b", "..", ".", "", ".x", "x/", "~/x", "a\0b", "a\nb", "a\rb"]
NAMES += ["\x1b[2Jx", "a\tb", "a\u202eb", "a\u2028b", "x" * 300, "\x7f"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_stays_in_its_folder(name: str, work: Path) -> None:
    with pytest.raises(InputError) as error:
        RunFolder("classification", name, None)
    assert str(error.value).isprintable()


# Secrets

COMMANDS = [
    ["--trainer.logger.init_args.api_key", SECRET],
    [f"--trainer.logger.init_args.api_key={SECRET}"],
    [f"--token={SECRET}"],
    ["--x.Password", SECRET],
    [f"--data.source.path=https://me:{SECRET}@host/a.csv"],
    ["--data.source.path", f"s3://me:{SECRET}@host/a.csv"],
    ["--data.source.path", f"https://host/a.csv?token={SECRET}"],
    ["--data.source.path", f"https://host/a.csv?a=1&X-Amz-Signature={SECRET}"],
    [f'--trainer.logger={{"class_path": "x", "init_args": {{"api_key": "{SECRET}"}}}}'],
    ["--trainer.logger", f"{{class_path: x, init_args: {{api_key: {SECRET}}}}}"],
    ["--trainer.logger.dict_kwargs", f"{{'token': '{SECRET}'}}"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=range(len(COMMANDS)))
def test_a_command_line_is_kept_without_its_secrets(words: list[str]) -> None:
    assert SECRET not in json.dumps(without_secrets(["train.py", "fit", *words]))


# Environment

ALLOWED = ["os;system", "../x", "os system", "*", "/tmp", "a-b", "a..b", "\x1b[2J"]


@pytest.mark.parametrize("value", ALLOWED)
def test_the_environment_admits_packages_alone(
    value: str, work: Path, canary: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECIPES_ALLOW", value)
    assert "RECIPES_ALLOW" in refused("classification", ["fit"], capfd)
