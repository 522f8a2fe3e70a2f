"""Where a benchmark ran: carried by every results file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import torch

import fastattn
from fastattn.dropout import CONTRACT_VERSION
from fastattn.extension import loading

from .cases import COMPILED

ROOT = Path(__file__).resolve().parent.parent


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = cpuinfo.exists() and re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M)
    return found.group(1) if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints; None where it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str | None:
    """What git says about this checkout; None without git or outside one."""
    return _output("git", "-C", str(ROOT), *arguments)


def _commit() -> tuple[str | None, bool | None]:
    """The short commit and whether the tree differs from it; results files are not looked at."""
    top = _git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != ROOT:
        return None, None
    changes = _git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return _git("rev-parse", "--short", "HEAD"), bool(changes)


def _gpu() -> dict:
    """The device's own figures, and its driver as nvidia-smi names it."""
    properties = torch.cuda.get_device_properties("cuda")
    return {
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def environment(device: str, program: str = "benchmarks") -> dict:
    commit, dirty = _commit()
    cpu = _cpu_model()
    return {
        "device": device,
        "path": "CUDA path" if device == "cuda" else "CPU path",
        "device_name": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "cpu": cpu,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "gpu": _gpu() if device == "cuda" else None,
        "triton": _version("triton"),
        "liger_kernel": _version("liger-kernel"),
        "python": platform.python_version(),
        "os": platform.platform(),
        "fastattn": fastattn.__version__,
        "dropout_contract": CONTRACT_VERSION,
        "commit": commit,
        "dirty": dirty,
        "extension": {"available": loading.available(), "why_not": loading.why_not()},
        "torch_compile": COMPILED,
        "torch_build": torch.__config__.show(),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", program, *sys.argv[1:]]),
    }


def device_slug(environment: dict) -> str:
    """A folder's name for the hardware, such as `cpu-intel-xeon-processor-2-threads`."""
    name = re.sub(r"\((r|tm)\)", "", environment["device_name"], flags=re.I)
    if environment["device"] == "cpu":
        name = f"cpu {name} {environment['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
