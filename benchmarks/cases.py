"""What is run: an op's sizes, the providers that compute it and the modes they are timed in."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEED = 0
Dtype = torch.dtype | None  # None: the case's own
Why = Callable[["Case", str], "str | None"]

#: The dtype of weights and data; "autocast" runs fp32 ones under bf16 autocast.
PRECISIONS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "autocast": torch.float32,
}


@dataclass(frozen=True)
class Case:
    """One size, in an encoder's terms; an op uses the dimensions that it has. Batch first."""

    batch: int
    sequence: int
    d_model: int
    nhead: int = 1
    precision: str = "fp32"
    dropout: float = 0.1
    padding: float | None = None  # share of the tokens that are padding; None: no mask is passed
    activation: str = "relu"
    layers: int = 1
    quick: bool = False  # whether it belongs to the set of `--quick`

    @property
    def name(self) -> str:
        words = [f"d{self.d_model}", f"S{self.sequence}", f"B{self.batch}", self.precision]
        if self.nhead > 1:
            words.insert(1, f"h{self.nhead}")
        if self.layers > 1:
            words.insert(0, f"{self.layers}x")
        if self.activation != "relu":
            words.append(self.activation)
        if self.dropout != 0.1:
            words.append(f"p{self.dropout:g}")
        if self.padding is not None:
            words.append(f"padded {self.padding:.0%}".replace("%", " %"))
        return " ".join(words)

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @property
    def dim_feedforward(self) -> int:
        return 4 * self.d_model

    @property
    def lengths(self) -> list[int]:
        """Tokens of every sequence that are no padding, evenly spread around their mean."""
        shortest = 1 - 2 * (self.padding or 0.0)
        shares = torch.linspace(shortest, 1, self.batch) if self.batch > 1 else torch.ones(1)
        return (shares * self.sequence).round().int().clamp(1).tolist()

    @property
    def tokens(self) -> int:
        """Tokens that are no padding."""
        return sum(self.lengths)

    @property
    def rows(self) -> int:
        """Tokens with the padding."""
        return self.batch * self.sequence

    def padding_mask(self, device: str) -> Tensor | None:
        """(batch, sequence) bool, True where padding; None where no mask is passed."""
        if self.padding is None:
            return None
        lengths = torch.tensor(self.lengths, device=device)
        return torch.arange(self.sequence, device=device) >= lengths[:, None]

    def normal(self, shape: Sequence[int], seed: int, device: str, dtype: torch.dtype) -> Tensor:
        """A seeded normal tensor, drawn on the CPU; the same numbers for every `dtype`."""
        generator = torch.Generator().manual_seed(seed)
        rounded = torch.bfloat16 if self.precision == "autocast" else self.dtype
        return torch.randn(tuple(shape), generator=generator).to(device, rounded).to(dtype)

    def autocast(self, device: str) -> contextlib.AbstractContextManager:
        return torch.autocast(device, torch.bfloat16, enabled=self.precision == "autocast")


@dataclass(frozen=True)
class Cost:
    """What a pass needs at least: floating-point operations, and bytes read or written once."""

    flops: float
    bytes: float | None = None  # None: not counted, since no single kernel is meant


class CannotRun(RuntimeError):
    """Raised by a provider that finds out only when called that it cannot run a case: a skip."""


def always(case: Case, device: str) -> str | None:
    """The reason of a provider that runs every case."""
    return None


@dataclass(frozen=True)
class Provider:
    """An implementation of an op: a module, run eagerly or through `torch.compile`.

    `module(case)` returns it on the CPU in fp32, with the same parameters under the same names for
    all providers of an op. It is called with the op's inputs, and its masks as keywords.
    """

    name: str
    module: Callable[[Case], nn.Module]
    compile_mode: str | None = None
    why_not: Why = always
    quick: bool = True

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("fastattn")

    def build(self, case: Case, device: str, dtype: Dtype = None) -> nn.Module:
        """The module with the case's weights, ready to be called."""
        torch.manual_seed(SEED)
        module = self.module(case)
        module.load_state_dict(_noisy(module.state_dict()))
        module.to(device, case.dtype).to(dtype or case.dtype)
        if self.compile_mode is None:
            return module
        # Not `module.compile()`: on a TransformerEncoderLayer it runs eagerly, without a word.
        return torch.compile(module, mode=self.compile_mode)


def _noisy(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Seeded weights from those a class starts with: no bias is zero and no norm weight is one."""
    generator = torch.Generator().manual_seed(SEED)
    return {
        name: value + 0.02 * torch.randn(value.shape, generator=generator)
        for name, value in state.items()
    }


#: How a provider may be compiled. The suite captures CUDA graphs itself, for all alike.
COMPILED = {"compiled": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def _why_not_tuned(why_not: Why, case: Case, device: str) -> str | None:
    if device == "cpu":
        return "max-autotune is compared on GPUs only"
    return why_not(case, device)


def with_compiled(provider: Provider) -> tuple[Provider, Provider, Provider]:
    """The provider, and the same through `torch.compile`: default and max-autotune."""
    compiled, tuned = (
        replace(provider, name=f"{provider.name} {suffix}", compile_mode=mode)
        for suffix, mode in COMPILED.items()
    )
    why_not = functools.partial(_why_not_tuned, provider.why_not)
    return provider, compiled, replace(tuned, why_not=why_not, quick=False)


def _no_masks(case: Case, device: str) -> dict[str, Tensor]:
    return {}


def _can_be_captured(case: Case, mode: Mode) -> str | None:
    return None


@dataclass(frozen=True)
class Op:
    """One thing to measure, the content of a file in `benchmarks/ops`.

    Attributes:
        name: of the op.
        cases: its sizes, by device.
        providers: first the baseline, against which accuracy is judged; ours start with "fastattn".
        inputs: shapes of the tensors a case is called with, by name; gradients are wanted for all.
        cost: what forward and backward of a case need, by pass.
        masks: keyword tensors without gradients.
        dropout_of: measures the probability with which a provider really drops.
        trains: whether there are parameters, and so a training step.
        why_not_captured: the reason why a case cannot be in a CUDA graph in a mode, or None.
    """

    name: str
    cases: Mapping[str, tuple[Case, ...]]
    providers: tuple[Provider, ...]
    inputs: Callable[[Case], dict[str, tuple[int, ...]]]
    cost: Callable[[Case], dict[str, Cost]]
    masks: Callable[[Case, str], dict[str, Tensor]] = _no_masks
    dropout_of: Callable[[Provider, Case, str], float] | None = None
    trains: bool = False
    why_not_captured: Callable[[Case, Mode], str | None] = _can_be_captured

    @property
    def baseline(self) -> Provider:
        return self.providers[0]

    @property
    def modes(self) -> tuple[Mode, ...]:
        return MODES if self.trains else MODES[:-1]

    def ours_like(self, peer: Provider) -> Provider | None:
        """Our provider that is to be compared with a peer: compiled the same way if there is one.

        None for our own providers.
        """
        if peer.is_ours:
            return None
        ours = [p for p in self.providers if p.is_ours]
        alike = [p for p in ours if p.compile_mode == peer.compile_mode]
        return next(iter([*alike, *ours]), None)

    def tensors(self, case: Case, device: str, dtype: Dtype = None) -> list[Tensor]:
        """The inputs of a case, as leaves that want gradients."""
        return [
            case.normal(shape, seed, device, dtype or case.dtype).requires_grad_()
            for seed, shape in enumerate(self.inputs(case).values(), start=1)
        ]

    def cotangent(self, case: Case, output: Tensor, device: str) -> Tensor:
        """A seeded gradient of the output, zero where padding is."""
        cotangent = case.normal(output.shape, 99, device, output.dtype)
        return without_padding(case, cotangent)


def without_padding(case: Case, tensor: Tensor) -> Tensor:
    """(batch, sequence, ...) with zeros where padding is."""
    mask = case.padding_mask(tensor.device.type)
    if mask is None:
        return tensor
    return tensor.masked_fill(mask.view(*mask.shape, *(1,) * (tensor.dim() - 2)), 0)


class Workload:
    """One provider's module for one case, with the tensors that every mode needs."""

    def __init__(self, op: Op, case: Case, provider: Provider, device: str):
        self.case, self.device = case, device
        self.module = provider.build(case, device)
        self.inputs = op.tensors(case, device)
        self.masks = op.masks(case, device)
        self.module.eval()
        with torch.no_grad():
            output = self.forward()
        self.cotangent = op.cotangent(case, output, device)
        self.optimizer = self._optimizer() if op.trains else None

    def _optimizer(self) -> torch.optim.Optimizer:
        on_gpu = self.device == "cuda"
        options = {"fused": True, "capturable": True} if on_gpu else {}
        return torch.optim.AdamW(self.module.parameters(), lr=1e-5, **options)

    def forward(self) -> Tensor:
        with self.case.autocast(self.device):
            return self.module(*self.inputs, **self.masks)

    def clear_gradients(self) -> None:
        for leaf in (*self.inputs, *self.module.parameters()):
            leaf.grad = None

    def eval_forward(self) -> None:
        with torch.no_grad():
            self.forward()

    def backward(self, output: Tensor) -> None:
        output.backward(self.cotangent)
        self.clear_gradients()

    def forward_backward(self) -> None:
        self.backward(self.forward())

    def training_step(self) -> None:
        F.mse_loss(self.forward(), self.cotangent).backward()
        self.optimizer.step()
        self.clear_gradients()


@dataclass(frozen=True)
class Mode:
    """A way to run a workload, and whether its module is in training mode (dropout on) for it.

    `prepare` runs before each timed `run`, and its result is given to that.
    """

    name: str
    run: Callable[..., Any]
    prepare: Callable[[Workload], Any] | None = None
    training: bool = True
    passes: tuple[str, ...] = field(default=("forward", "backward"))


MODES = (
    Mode("eval forward", Workload.eval_forward, training=False, passes=("forward",)),
    Mode("forward", Workload.forward, passes=("forward",)),
    Mode("backward", Workload.backward, prepare=Workload.forward, passes=("backward",)),
    Mode("forward+backward", Workload.forward_backward),
    Mode("training step", Workload.training_step),
)
