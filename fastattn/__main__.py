"""``python -m fastattn``: the environment, and per op each backend or the reason it cannot run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

import torch

import fastattn
from fastattn import dispatch, dropout
from fastattn.extension import loading


def environment() -> dict[str, str]:
    """What this installation runs on, in words."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none visible to torch"
    has_triton = importlib.util.find_spec("triton") is not None
    return {
        "fastattn": fastattn.__version__,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if has_triton else "not installed",
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "GPU": device,
        "CPU threads": str(torch.get_num_threads()),
        "C++ extension": loading.why_not() or "built",
        "CUDA kernels": loading.why_not_cuda() or f"built for {loading.cuda_architectures()}",
        "dropout contract": f"version {dropout.CONTRACT_VERSION}",
    }


def report() -> str:
    """The whole report."""
    facts = environment()
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {fact}" for name, fact in facts.items()]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines += ["", f"Backends on {device}, best first:"]
    for op in sorted(dispatch.BACKENDS):
        lines.append(f"  {op}")
        for backend, reason in dispatch.reasons_of(op, device).items():
            lines.append(f"    {backend:<11} {'yes' if reason is None else f'no: {reason}'}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
