"""Planning never imports torch."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import quire.presets, quire.plan.hardware, quire.plan.memory, quire.plan.exits
from quire.config import EngineConfig
from quire.models.config import parse_model_config
from tests.plan.models import machine, shape
from quire.plan.exits import diagnose
from quire.plan.memory import make_plan
make_plan(EngineConfig("m"), shape(), 1 << 30, machine(8 << 30))
diagnose(EngineConfig("m"), shape(), 1 << 30, machine(1 << 30))
loaded = [name for name in sys.modules if name.split(".")[0] in ("torch", "numpy", "transformers")]
assert not loaded, loaded
"""


def test_torch_is_not_imported() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True)
