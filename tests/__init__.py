"""The tests. What every process of theirs needs is set here, before the first import."""

import importlib
import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed looks for it when it is imported
os.environ["OMP_NUM_THREADS"] = "1"  # in every process that a test starts: threads of several would fight
os.environ["PYTHONDONTWRITEBYTECODE"] = ""  # hundreds of processes would compile all that they import
sys.dont_write_bytecode = False
# The types of our own modules are checked, and a package that one of them is the first to import is compiled anew.
for name in (
    "beartype",
    "lightning.pytorch",
    "matplotlib.pyplot",
    "torch._inductor.config",
    "transformers.models.auto.modeling_auto",
):
    importlib.import_module(name)
