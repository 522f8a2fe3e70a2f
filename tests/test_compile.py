"""What torch.compile sees of a training layer: the library's ops, not what is inside them."""

from __future__ import annotations

from collections import Counter

import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs

from fastattn import FusedEncoderLayer


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
