"""Two processes: data, fully sharded and tensor parallelism give what one process gives."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastattn import FusedEncoderLayer
from tests.layers.pairs import HEADS, HIDDEN, WIDTH, assert_equal_runs

WORLD = 2


def parallel_layer(kind: type = FusedEncoderLayer, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return kind(WIDTH, HEADS, HIDDEN, dropout, batch_first=True, dtype=torch.float64)


def parallel_src() -> Tensor:
    return torch.sin(torch.arange(2 * WORLD * 5 * WIDTH).double()).view(2 * WORLD, 5, WIDTH)


def shard(rank: int) -> Tensor:
    return parallel_src()[2 * rank : 2 * rank + 2]


def full(x: Tensor) -> Tensor:
    return (x.full_tensor() if hasattr(x, "full_tensor") else x).detach()


def backward(model: nn.Module, src: Tensor) -> dict[str, Tensor]:
    out = model(src)
    out = out.full_tensor() if hasattr(out, "full_tensor") else out
    out.square().sum().backward()
    grads = {n.removeprefix("module."): full(p.grad) for n, p in model.named_parameters()}
    return {"output": out.detach(), **grads}


def run_ddp(rank: int, mesh: Any) -> dict[str, Tensor]:
    return backward(nn.parallel.DistributedDataParallel(parallel_layer()), shard(rank))


def run_ddp_dropout(rank: int, mesh: Any) -> dict[str, Tensor]:
    model = nn.parallel.DistributedDataParallel(parallel_layer(dropout=0.3))
    torch.manual_seed(rank)
    return backward(model, shard(0))


def run_fsdp(rank: int, mesh: Any) -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(parallel_layer(), parallel_layer())
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return backward(fully_shard(model, mesh=mesh), shard(rank))


def run_fsdp_bf16(rank: int, mesh: Any) -> dict[str, Tensor]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = fully_shard(parallel_layer(dropout=0.1).float(), mesh=mesh, mp_policy=policy)
    found = backward(model, shard(rank).float())
    torch.optim.AdamW(model.parameters()).step()
    return found


def run_tensor_parallel(
    rank: int, mesh: Any, dropout: float = 0.0, local: bool = True
) -> dict[str, Tensor]:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    layer = parallel_layer(dropout=dropout)
    calls: list[int] = []
    layer.linear1.register_forward_hook(lambda *_: calls.append(1))
    plan = {"linear1": ColwiseParallel(use_local_output=local), "linear2": RowwiseParallel()}
    parallelize_module(layer, mesh, plan)
    torch.manual_seed(7)
    found = backward(layer, parallel_src())
    assert len(calls) == 1
    return found


def run_replicated(rank: int, mesh: Any) -> dict[str, Tensor]:
    """Every weight and the input a DTensor; of torch's attention kernels MATH takes those."""
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

    layer = distribute_module(parallel_layer(), mesh)
    with sdpa_kernel(SDPBackend.MATH):
        return backward(layer, distribute_tensor(parallel_src(), mesh, [Replicate()]))


SCENARIOS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "ddp": run_ddp,
    "ddp, dropout": run_ddp_dropout,
    "fsdp2": run_fsdp,
    "fsdp2, bf16": run_fsdp_bf16,
    "tensor parallel": run_tensor_parallel,
    "tensor parallel, sharded hidden": partial(run_tensor_parallel, local=False),
    "tensor parallel, dropout": partial(run_tensor_parallel, dropout=0.3),
    "replicated": run_replicated,
}


def run_scenarios(rank: int, folder: str) -> None:
    """One process: every scenario, its result or its error in a file."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, store=store)
    mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
    for i, run in enumerate(SCENARIOS.values()):
        try:
            result: Any = run(rank, mesh)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        torch.save(result, f"{folder}/{i}.{rank}.pt")
        dist.barrier()
    # Gloo's threads outlive the group, which DTensor's caches keep, and one at work while an
    # interpreter ends would abort its process: this one leaves without that.
    os._exit(0)


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory) -> Callable[[str], list[dict[str, Tensor]]]:
    """The results of a scenario on both ranks; all run once, in one pair of processes."""
    folder: Path = tmp_path_factory.mktemp("processes")
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch was built without gloo")
    mp.spawn(run_scenarios, (str(folder),), nprocs=WORLD)

    def results(name: str) -> list[dict[str, Tensor]]:
        index = list(SCENARIOS).index(name)
        found = [torch.load(folder / f"{index}.{rank}.pt") for rank in range(WORLD)]
        for result in found:
            assert not isinstance(result, str), result
        return found

    return results


def assert_mean_of_shards(found: list[dict[str, Tensor]], stock: nn.Module) -> None:
    parts = []
    for rank in range(WORLD):
        stock.zero_grad()
        parts.append(backward(stock, shard(rank)))
    expected = averaged(parts)
    for result, part in zip(found, parts, strict=True):
        assert_equal_runs(result, {**expected, "output": part["output"]})


def averaged(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean gradients: what data parallelism leaves on every rank."""
    return {name: sum(part[name] for part in parts) / WORLD for name in parts[0]}


def test_data_parallel(scenarios):
    assert_mean_of_shards(scenarios("ddp"), parallel_layer(nn.TransformerEncoderLayer))


def test_data_parallel_ranks_drop_by_their_own_generators(scenarios):
    first, second = scenarios("ddp, dropout")
    assert not torch.equal(first.pop("output"), second.pop("output"))
    for name, grad in first.items():
        assert torch.equal(grad, second[name])  # averaged
    alone = []
    for rank in range(WORLD):
        layer = parallel_layer(dropout=0.3)
        torch.manual_seed(rank)
        alone.append(backward(layer, shard(0)))
    expected = averaged(alone)
    del expected["output"]
    assert_equal_runs(first, expected)


def test_fully_sharded(scenarios):
    stock = nn.Sequential(*(parallel_layer(nn.TransformerEncoderLayer) for _ in range(2)))
    assert_mean_of_shards(scenarios("fsdp2"), stock)


def test_fully_sharded_in_bf16(scenarios):
    for result in scenarios("fsdp2, bf16"):
        assert result["output"].dtype == torch.bfloat16
        assert all(x.isfinite().all() for x in result.values())
        assert all(x.dtype == torch.float32 for name, x in result.items() if name != "output")


@pytest.mark.parametrize(
    "name", ["tensor parallel", "tensor parallel, sharded hidden", "replicated"]
)
def test_tensor_parallel(scenarios, name):
    expected = backward(parallel_layer(nn.TransformerEncoderLayer), parallel_src())
    for result in scenarios(name):
        assert_equal_runs(result, expected, 1e-9)


def test_tensor_parallel_with_dropout(scenarios):
    """Ranks with equal generators agree on the residual stream."""
    first, second = scenarios("tensor parallel, dropout")
    assert_equal_runs(first, second)
    plain = backward(parallel_layer(), parallel_src())
    assert not torch.allclose(first["output"], plain["output"])
    assert all(x.isfinite().all() for x in first.values())
