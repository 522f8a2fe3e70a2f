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


def python(*arguments, **variables: str) -> subprocess.CompletedProcess:
    """Run Python with the programs on its path. The limit is for what hangs, not what is slow."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")])
    here = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **here, **variables}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)


def refusal(capsys, run, *options) -> str:
    with pytest.raises(SystemExit) as error:
        run(*options)
    assert error.value.code == 2
    return capsys.readouterr().err
