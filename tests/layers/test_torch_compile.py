"""What torch.compile sees of a training layer: the library's ops, not what is inside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs

from fastattn import FusedEncoderLayer, tracing
from fastattn.extension import inference, loading


def fastattn_ops(graph: torch.fx.GraphModule) -> Counter[str]:
    names = (str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return Counter(name.split(".")[1] for name in names if name.startswith("fastattn."))


def test_training_graphs_hold_each_op_once_and_no_random_number_arithmetic() -> None:
    layer = FusedEncoderLayer(32, 4, 64, dropout=0.1, activation="gelu", batch_first=True)
    backend = AotEagerAndRecordGraphs()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    src = torch.randn(2, 16, 32, requires_grad=True)
    compiled(src, seed=torch.tensor([3])).square().sum().backward()
    (forward,), (backward,) = backend.fw_graphs, backend.bw_graphs
    assert fastattn_ops(forward) == {
        "attention_packed_fwd": 1,
        "dropout_add_layer_norm_fwd": 2,
        "feed_forward_fwd": 1,
    }
    assert fastattn_ops(backward) == {
        "attention_packed_bwd": 1,
        "dropout_add_layer_norm_bwd": 2,
        "feed_forward_bwd": 1,
    }
    for graph in (forward, backward):
        targets = {str(node.target) for node in graph.graph.nodes}
        assert not any("bitwise" in target or "rshift" in target for target in targets)
    zeros = [node for node in backward.graph.nodes if "zeros" in str(node.target)]
    assert not zeros, "gradients of outputs that nobody used are passed as zeros"


def test_a_compiled_step_with_its_backward_is_the_eager_one() -> None:
    """The compiler is then at work while autograd calls the ops, and would enter them."""
    script = Path(__file__).with_name("torch_compile_steps.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    differences = json.loads(run.stdout)
    assert len(differences) == 11
    assert {name: size for name, size in differences.items() if size > 1e-6} == {}


def test_second_derivatives_taken_inside_a_compiled_function() -> None:
    layer = FusedEncoderLayer(16, 2, 32, dropout=0.1, activation="gelu", batch_first=True)
    src, seed = torch.randn(2, 5, 16, requires_grad=True), torch.tensor([3])

    def penalty(loss: torch.Tensor, src: torch.Tensor) -> None:
        (gradient,) = torch.autograd.grad(loss, src, create_graph=True)
        gradient.square().sum().backward()

    found = []
    for function in (penalty, torch.compile(penalty, backend="eager")):
        src.grad = None
        function(layer(src, seed=seed).square().sum(), src)
        found.append(src.grad)
    torch.compiler.reset()
    torch.testing.assert_close(*found)


def test_calls_of_the_extension_break_a_graph_and_keep_their_tensors() -> None:
    if not loading.available():
        pytest.skip("needs the C++ extension")

    def run(x: torch.Tensor) -> torch.Tensor:
        return inference.add_bias_relu_(x * 2, x[0] + 1).sum()

    x = torch.randn(64, 64)
    compiled = torch.compile(run, backend="eager")
    for _ in range(3):
        torch.testing.assert_close(compiled(x), (x * 2 + x[0] + 1).relu().sum())
    torch.compiler.reset()
    with pytest.raises(Exception, match="it hands addresses to a kernel"):
        torch.compile(run, backend="eager", fullgraph=True)(x)
    torch.compiler.reset()


def test_a_torch_that_skips_frames_by_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._dynamo.eval_frame, "set_code_exec_strategy")

    def function(x: int) -> bool:
        return torch.compiler.is_compiling() or x != 3

    hidden = tracing.opaque(function)
    assert hidden is not function
    assert not torch.compile(lambda x: hidden(x), backend="eager")(3)
    torch.compiler.reset()


def test_hiding_ops_from_the_compiler_does_not_import_it() -> None:
    lines = "import sys, fastattn, fastattn.ops.attention; print('torch._dynamo' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False"]
