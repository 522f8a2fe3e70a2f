"""What is run: the sizes, the providers of an encoder layer and the modes it is timed in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn import FusedEncoderLayer

SEED = 0
Dtype = torch.dtype | None  # None: the case's own


@dataclass(frozen=True)
class Case:
    """One size of the layer: post-norm and relu as stock has it, batch first, no padding."""

    d_model: int
    nhead: int
    dim_feedforward: int
    sequence: int
    batch: int
    dtype: torch.dtype = torch.float32
    dropout: float = 0.1

    @property
    def name(self) -> str:
        return f"d{self.d_model} S{self.sequence} B{self.batch}"

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    def tensor(self, seed: int, device: str) -> Tensor:
        """A seeded normal (batch, sequence, d_model) tensor, drawn on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        shape = (self.batch, self.sequence, self.d_model)
        return torch.randn(shape, generator=generator).to(device, self.dtype)

    def weights(self) -> dict[str, Tensor]:
        """A seeded state_dict, with noise: no bias is zero and no norm weight is one."""
        generator = torch.Generator().manual_seed(SEED)
        initial = STOCK.layer(self, 0.0, "cpu").state_dict()
        return {
            name: value + 0.02 * torch.randn(value.shape, generator=generator).to(value.dtype)
            for name, value in initial.items()
        }


CASES = {
    "cpu": (
        Case(128, 4, 512, 128, 16),
        Case(384, 12, 1536, 128, 8),
        Case(768, 12, 3072, 128, 8),
    ),
    "cuda": (
        Case(768, 12, 3072, 512, 32, torch.bfloat16),  # BERT-base
        Case(1024, 16, 4096, 512, 16, torch.bfloat16),  # BERT-large
        Case(2048, 16, 8192, 1024, 8, torch.bfloat16),
    ),
}


@dataclass(frozen=True)
class Provider:
    """An implementation of the layer: a class, run eagerly or through `torch.compile`."""

    name: str
    layer_class: type[nn.TransformerEncoderLayer]
    compiled: bool = False

    @property
    def is_stock(self) -> bool:
        return self.layer_class is nn.TransformerEncoderLayer

    def layer(self, case: Case, dropout: float, device: str, dtype: Dtype = None) -> nn.Module:
        """The layer as its class builds it, from a fixed seed."""
        torch.manual_seed(SEED)
        return self.layer_class(
            case.d_model,
            case.nhead,
            case.dim_feedforward,
            dropout,
            batch_first=True,
            device=device,
            dtype=dtype or case.dtype,
        )

    def build(self, case: Case, dropout: float, device: str, dtype: Dtype = None) -> nn.Module:
        """The layer with the case's weights, ready to be called."""
        layer = self.layer(case, dropout, device, dtype)
        layer.load_state_dict(case.weights())
        # Not `layer.compile()`: on this class it runs eagerly, without a word.
        return torch.compile(layer) if self.compiled else layer


STOCK = Provider("stock", nn.TransformerEncoderLayer)
STOCK_COMPILED = Provider("stock compiled", nn.TransformerEncoderLayer, compiled=True)
FUSED = Provider("fastattn", FusedEncoderLayer)
FUSED_COMPILED = Provider("fastattn compiled", FusedEncoderLayer, compiled=True)
PROVIDERS = (STOCK, STOCK_COMPILED, FUSED, FUSED_COMPILED)


class Workload:
    """One provider's layer for one case, with the tensors that every mode needs."""

    def __init__(self, case: Case, provider: Provider, device: str):
        self.layer = provider.build(case, case.dropout, device)
        self.src = case.tensor(1, device).requires_grad_()
        self.target = case.tensor(2, device)
        self.optimizer = torch.optim.AdamW(self.layer.parameters(), lr=1e-5)

    def clear_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.src.grad = None

    def eval_forward(self) -> None:
        with torch.no_grad():
            self.layer(self.src)

    def forward(self) -> None:
        self.layer(self.src)

    def forward_backward(self) -> None:
        self.layer(self.src).backward(self.target)
        self.clear_gradients()

    def training_step(self) -> None:
        F.mse_loss(self.layer(self.src), self.target).backward()
        self.optimizer.step()
        self.clear_gradients()


@dataclass(frozen=True)
class Mode:
    """A way to run a workload, and whether the layer is in training mode (dropout on) for it."""

    name: str
    run: Callable[[Workload], None]
    training: bool = True


MODES = (
    Mode("eval forward", Workload.eval_forward, training=False),
    Mode("forward", Workload.forward),
    Mode("forward+backward", Workload.forward_backward),
    Mode("training step", Workload.training_step),
)
