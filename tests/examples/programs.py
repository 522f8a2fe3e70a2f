"""The example programs, imported as they import each other: by their bare names."""

import importlib
import os
import subprocess
import sys

import pytest

from tests import ROOT

for package in ("matplotlib", "rich", "safetensors", "sklearn", "tokenizers"):
    pytest.importorskip(package)

sys.path.insert(0, str(ROOT / "examples"))
finetune, pretrain, text, training = map(
    importlib.import_module, ("finetune", "pretrain", "text", "training")
)


def python(*arguments) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def refusal(capsys, run, *options) -> str:
    with pytest.raises(SystemExit) as error:
        run(*options)
    assert error.value.code == 2
    return capsys.readouterr().err
