"""Attention of separate query, key and value, (B, S, H, D): SDPA's kernels, Flex and fastattn.

torch's own choice (`sdpa`) is the baseline; its kernels are also forced one by one. How often each
really drops is measured, since not all of them take the probability that they are given.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn.dropout import draw_seed

from ..cases import CannotRun, Case, Cost, Op, Provider, with_compiled


class Attention(nn.Module):
    """(B, S, H, D) in and out; `padding` is (B, S), True where a key is to be ignored."""

    def __init__(self, case: Case):
        super().__init__()
        self.dropout_p = case.dropout

    @property
    def p(self) -> float:
        return self.dropout_p if self.training else 0.0

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None = None
    ) -> Tensor:
        raise NotImplementedError


class Sdpa(Attention):
    """`F.scaled_dot_product_attention`, with the kernel that torch chooses."""

    def forward(self, query, key, value, padding=None):
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        mask = None if padding is None else ~padding[:, None, None]
        out = F.scaled_dot_product_attention(query, key, value, mask, dropout_p=self.p)
        return out.transpose(1, 2)


class ForcedSdpa(Sdpa):
    """The same with one kernel of torch's, or not at all."""

    def __init__(self, kernel: SDPBackend, case: Case):
        super().__init__(case)
        self.kernel = kernel

    def forward(self, query, key, value, padding=None):
        try:
            with sdpa_kernel(self.kernel):
                return super().forward(query, key, value, padding)
        except RuntimeError as error:
            if "No available kernel" in str(error):
                raise CannotRun("torch has no such kernel for these inputs here") from error
            raise


@functools.cache
def _compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


class Flex(Attention):
    """Compiled FlexAttention, which has no dropout; a block mask made once, as its users do."""

    block_mask = None

    def forward(self, query, key, value, padding=None):
        from torch.nn.attention.flex_attention import create_block_mask

        if padding is not None and self.block_mask is None:
            batch, length = padding.shape
            self.block_mask = create_block_mask(
                lambda b, h, m, n: ~padding[b, n], batch, None, length, length, padding.device.type
            )
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        out = _compiled_flex_attention()(query, key, value, block_mask=self.block_mask)
        return out.transpose(1, 2)


class Fastattn(Attention):
    def forward(self, query, key, value, padding=None):
        seed = draw_seed(query.device) if self.p else None
        return fastattn.attention(
            query, key, value, key_padding_mask=padding, dropout_p=self.p, seed=seed
        )


def why_not_cuda(case: Case, device: str) -> str | None:
    return None if device == "cuda" else "a CUDA kernel"


def why_not_flash(case: Case, device: str) -> str | None:
    if case.padding is not None:
        return "SDPA's flash kernel takes no mask"
    if case.dtype == torch.float32:
        return "SDPA's flash kernel takes no fp32"
    return why_not_cuda(case, device)


def why_not_cudnn(case: Case, device: str) -> str | None:
    if case.dtype == torch.float32:
        return "cuDNN's kernel takes no fp32"
    return why_not_cuda(case, device)


def why_not_flex(case: Case, device: str) -> str | None:
    return None if device == "cuda" else "FlexAttention has no backward on a CPU"


def dropout_of(provider: Provider, case: Case, device: str) -> float:
    """The share of probabilities that a provider drops, of 4 million or more.

    Equal scores make every probability 1/S, and with the identity as values the output shows each
    of them: it is 0 where one was dropped.
    """
    length = case.d_model // case.nhead
    heads = -(-(2**22) // length**2)
    module = provider.build(case, device).train()
    shape = (1, length, heads, length)
    query = torch.zeros(shape, device=device, dtype=case.dtype)
    value = torch.eye(length, device=device, dtype=case.dtype)[None, :, None].expand(shape)
    with torch.no_grad():
        out = module(query, query, value.contiguous())
    return (out == 0).double().mean().item()


def cost(case: Case) -> dict[str, Cost]:
    """Forward: S and P V, 4 · length² · d_model FLOPs a sequence; backward five products, 10.

    Lengths are without padding, since the result needs no more. Forward reads q, k, v and writes
    the output, backward reads these and the output's gradient and writes three: 4 and 8 tensors of
    tokens · d_model elements. The row statistics, 4 bytes a head and token, are left out.
    """
    products = sum(length**2 for length in case.lengths) * case.d_model
    tensor = case.tokens * case.d_model * case.dtype.itemsize
    return {
        "forward": Cost(4 * products, 4 * tensor),
        "backward": Cost(10 * products, 8 * tensor),
    }


def inputs(case: Case) -> dict[str, tuple[int, ...]]:
    shape = (case.batch, case.sequence, case.nhead, case.d_model // case.nhead)
    return {"query": shape, "key": shape, "value": shape}


def masks(case: Case, device: str) -> dict[str, Tensor]:
    mask = case.padding_mask(device)
    return {} if mask is None else {"padding": mask}


def sixteen_thousand_tokens(sequence: int, head_dim: int, **options) -> Case:
    return Case(16384 // sequence, sequence, 1024, 1024 // head_dim, "bf16", **options)


LONG = (512, 1024, 2048, 4096)

OP = Op(
    name="attention",
    cases={
        "cpu": (
            Case(8, 128, 384, 6, quick=True),
            Case(8, 128, 384, 6, padding=0.5),
        ),
        "cuda": (
            *(
                sixteen_thousand_tokens(sequence, head_dim, quick=(sequence, head_dim) == (512, 64))
                for head_dim in (64, 128)
                for sequence in (128, 256, *LONG)
            ),
            *(
                sixteen_thousand_tokens(512, 64, padding=share, quick=share == 0.5)
                for share in (0.0, 0.25, 0.5)
            ),
            *(sixteen_thousand_tokens(2048, 64, padding=share) for share in (0.0, 0.5)),
            *(
                sixteen_thousand_tokens(sequence, head_dim, dropout=0.125)
                for head_dim in (64, 128)
                for sequence in LONG
            ),
            *(
                sixteen_thousand_tokens(sequence, head_dim, dropout=0.0)
                for head_dim in (64, 128)
                for sequence in (512, 2048)
            ),
            Case(64, 128, 768, 12, "bf16"),
        ),
    },
    providers=(
        *with_compiled(Provider("sdpa", Sdpa)),
        *(
            Provider(f"sdpa {name}", functools.partial(ForcedSdpa, kernel), why_not=why_not)
            for name, kernel, why_not in (
                ("flash", SDPBackend.FLASH_ATTENTION, why_not_flash),
                ("efficient", SDPBackend.EFFICIENT_ATTENTION, why_not_cuda),
                ("cudnn", SDPBackend.CUDNN_ATTENTION, why_not_cudnn),
            )
        ),
        Provider("flex (no dropout)", Flex, why_not=why_not_flex),
        *with_compiled(Provider("fastattn", Fastattn)),
    ),
    inputs=inputs,
    cost=cost,
    masks=masks,
    dropout_of=dropout_of,
)
