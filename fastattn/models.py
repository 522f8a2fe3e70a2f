"""Encoders to pre-train and to adapt, on fused or stock layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastattn import tracing
from fastattn.layers.encoder_layer import FusedEncoderLayer

__all__ = [
    "ActivationFreeEncoderLayer",
    "PositionalEncoding",
    "SequenceEncoder",
    "TaskAdapter",
    "train_adapted_model",
]

#: What ``SequenceEncoder(layer=)`` may be, beside a callable that makes one layer.
LAYERS = {"fused": FusedEncoderLayer, "stock": nn.TransformerEncoderLayer}


class ActivationFreeEncoderLayer(FusedEncoderLayer):
    """A layer with nothing between the linear maps: LN(x + dropout(W2 dropout(W1 x + b1) + b2)).

    Arguments and parameters are those of :class:`fastattn.FusedEncoderLayer`, but for
    ``activation``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, activation=nn.Identity(), **kwargs)


class PositionalEncoding(nn.Module):
    """x + PE, with PE[t, 2i] = sin(t / 10000^(2i / d_model)) and PE[t, 2i + 1] the cosine.

    From "Attention Is All You Need" (Vaswani et al., 2017), section 3.5. The encodings are a buffer
    that is not part of ``state_dict``. They are computed again where the module gets memory with
    nothing in it (``to_empty``), and where it is on the "meta" device and ``x`` is not, as after
    ``load_state_dict(..., assign=True)``, then in the dtype of ``x``.

    Args:
        d_model: width, even or odd.
        max_len: length of the longest sequence.
        batch_first: whether sequences are (N, S, d_model), not (S, N, d_model).
    """

    encoding: Tensor

    def __init__(
        self,
        d_model: int,
        max_len: int = 5000,
        *,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_positive(d_model=d_model, max_len=max_len)
        self.batch_first = batch_first
        encoding = torch.empty(max_len, d_model, device=device, dtype=dtype)
        self.register_buffer("encoding", encoding, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill in the encodings, computed in fp64."""
        if self.encoding.is_meta:
            return
        table = self._table()
        if hasattr(self.encoding, "device_mesh"):  # a DTensor
            from torch.distributed.tensor import distribute_tensor

            where = self.encoding.device_mesh, self.encoding.placements
            table = distribute_tensor(table, *where, src_data_rank=None)
        self.encoding.copy_(table)

    def _table(self) -> Tensor:
        """The encodings, (max_len, d_model) in fp64 on the CPU."""
        max_len, d_model = self.encoding.shape
        exact = {"dtype": torch.float64, "device": "cpu"}
        rate = 10_000.0 ** -(torch.arange(0, d_model, 2, **exact) / d_model)
        angle = torch.arange(max_len, **exact)[:, None] * rate
        return torch.stack((angle.sin(), angle.cos()), -1).flatten(1)[:, :d_model]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PositionalEncoding:
        before = self.encoding
        if before.is_meta:
            try:
                fn(before)
            except NotImplementedError:  # it copies, and there is nothing to copy
                self.encoding = torch.empty_like(before, device="cpu")
        super()._apply(fn, recurse)
        if before.is_meta or not _holds(self.encoding, before):
            self.reset_parameters()
        return self

    def _encoding_of(self, x: Tensor) -> Tensor:
        """The encodings where they or ``x``, and not both, are on the "meta" device."""
        if x.is_meta:
            return self.encoding.to("meta")
        if torch.compiler.is_compiling() or tracing.watched():  # whose tensors must not stay here
            return self._table().to(x)
        with torch.inference_mode(False):
            self.encoding = self._table().to(x.device, x.dtype)
        return self.encoding

    def forward(self, x: Tensor) -> Tensor:
        """Add the encodings of the positions 0, 1, ...

        Args:
            x: (S, N, d_model), with ``batch_first`` (N, S, d_model), or (S, d_model).

        Raises:
            ValueError: ``x`` is longer than ``max_len`` or of another width.
        """
        encoding = self.encoding
        max_len, d_model = encoding.shape
        if x.dim() not in (2, 3) or x.shape[-1] != d_model:
            raise ValueError(
                f"x must be (..., {d_model}) with 2 or 3 dimensions, not {tuple(x.shape)}"
            )
        between = x.dim() == 3 and not self.batch_first
        length = x.shape[0] if between else x.shape[-2]
        if length > max_len:
            raise ValueError(f"x has {length} positions, and max_len is {max_len}")
        if encoding.is_meta is not x.is_meta:
            encoding = self._encoding_of(x)
        encoding = encoding[:length]
        return x + (encoding.unsqueeze(1) if between else encoding)


def _holds(after: Tensor, before: Tensor) -> bool:
    """Whether ``after`` is ``before``, perhaps converted, and not memory that is yet to fill."""
    if after is before or after.is_meta:
        return True
    if hasattr(after, "device_mesh"):  # a DTensor, whose parts are elsewhere
        return False
    return type(after) is not Tensor or torch.equal(after, before.to(after))


class SequenceEncoder(nn.Module):
    """Tokens to hidden states or logits: embedding, positions, encoder layers, linear map.

    The embedding is multiplied by sqrt(embed_dim), as in Vaswani et al. (2017), section 3.4. Every
    parameter with more than one dimension begins Xavier-uniform (Glorot and Bengio, 2010).

    Args:
        vocab_size: number of tokens.
        embed_dim, num_heads, ff_dim: widths of a layer; ``num_heads`` divides ``embed_dim``.
        num_layers: how many layers there are.
        drop_rate: dropout in the layers.
        layer: ``"fused"``, ``"stock"``, or what takes the arguments of
            ``torch.nn.TransformerEncoderLayer``. The ``state_dict`` of fused and of stock layers is
            the same.
        max_len: length of the longest sequence.
        batch_first: whether tokens are (N, S), not (S, N).
        checkpoint_layers: keep only the input of every layer for backward, and run it again there.
        layer_options: further arguments of the layers, such as ``activation`` or ``norm_first``.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        num_heads: int,
        ff_dim: int,
        num_layers: int,
        drop_rate: float = 0.1,
        *,
        layer: str | Callable[..., nn.Module] = "fused",
        max_len: int = 5000,
        batch_first: bool = False,
        checkpoint_layers: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **layer_options: Any,
    ) -> None:
        super().__init__()
        _check_positive(
            vocab_size=vocab_size, embed_dim=embed_dim, num_heads=num_heads, ff_dim=ff_dim,
            num_layers=num_layers,
        )  # fmt: skip
        if embed_dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide embed_dim {embed_dim}")
        if not 0 <= drop_rate <= 1:
            raise ValueError(f"drop_rate must be from 0 to 1, not {drop_rate}")
        if isinstance(layer, str) and layer not in LAYERS:
            raise ValueError(f"layer must be one of {tuple(LAYERS)} or a callable, not {layer!r}")
        make = LAYERS[layer] if isinstance(layer, str) else layer
        where = {"device": device, "dtype": dtype}
        self.batch_first = batch_first
        self.checkpoint_layers = checkpoint_layers
        self.embedding = nn.Embedding(vocab_size, embed_dim, **where)
        self.positions = PositionalEncoding(embed_dim, max_len, batch_first=batch_first, **where)
        options = {"dropout": drop_rate, "batch_first": batch_first, **where, **layer_options}
        self.layers = nn.ModuleList(
            make(embed_dim, num_heads, ff_dim, **options) for _ in range(num_layers)
        )
        self.output = nn.Linear(embed_dim, vocab_size, **where)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        tokens: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        return_hidden: bool = False,
    ) -> Tensor:
        """Encode sequences.

        Args:
            tokens: (S, N), with ``batch_first`` (N, S), or (S,); int64 or int32.
            key_padding_mask: (N, S) or (S,) bool, True where there is no token; or None.
            return_hidden: leave out the linear map to the vocabulary.

        Returns:
            (*tokens.shape, vocab_size) logits, or (*tokens.shape, embed_dim) hidden states.

        Raises:
            ValueError: an argument has the wrong shape, or sequences are longer than ``max_len``.
        """
        if tokens.dim() not in (1, 2):
            raise ValueError(f"tokens must have 1 or 2 dimensions, not {tuple(tokens.shape)}")
        hidden = self.embedding(tokens) * math.sqrt(self.embedding.embedding_dim)
        hidden = self.positions(hidden)
        again = self.checkpoint_layers and self.training and torch.is_grad_enabled()
        for layer in self.layers:
            if again:
                hidden = checkpoint(
                    layer, hidden, src_key_padding_mask=key_padding_mask, use_reentrant=False
                )
            else:
                hidden = layer(hidden, src_key_padding_mask=key_padding_mask)
        return hidden if return_hidden else self.output(hidden)


class TaskAdapter(nn.Module):
    """A classifier on a pre-trained encoder: mean over the real tokens, then a linear map.

    Args:
        pretrained_encoder: a :class:`SequenceEncoder`, or a module with its ``batch_first`` and
            ``embedding`` that returns (..., embed_dim) hidden states when called as
            ``encoder(tokens, key_padding_mask, return_hidden=True)``. It is not copied.
        num_classes: at least 2.
        freeze: train the linear map only. The encoder then stays in evaluation mode, its parameters
            need no gradient, and nothing of it is kept for backward.
    """

    def __init__(
        self, pretrained_encoder: SequenceEncoder, num_classes: int, *, freeze: bool = True
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, not {num_classes}")
        self.encoder = pretrained_encoder
        self.freeze = freeze
        weight = pretrained_encoder.embedding.weight
        self.classifier = nn.Linear(
            weight.shape[1], num_classes, device=weight.device, dtype=weight.dtype
        )
        self.encoder.requires_grad_(not freeze)
        self.train(self.training)

    def train(self, mode: bool = True) -> TaskAdapter:
        super().train(mode)
        if self.freeze:
            self.encoder.eval()
        return self

    def forward(self, tokens: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """(N, num_classes) logits, or (num_classes,) for one sequence without a batch.

        Arguments are those of the encoder. A sequence without a real token counts as zeros.
        """
        with torch.no_grad() if self.freeze else nullcontext():
            hidden = self.encoder(tokens, key_padding_mask, return_hidden=True)
        over = -2 if self.encoder.batch_first or tokens.dim() == 1 else 0
        if key_padding_mask is None:
            return self.classifier(hidden.mean(over))
        padding = key_padding_mask if over == -2 else key_padding_mask.t()
        total = hidden.masked_fill(padding.unsqueeze(-1), 0.0).sum(over)
        count = (~padding).sum(over + 1 if over else 0).clamp(min=1)
        return self.classifier(total / count.unsqueeze(-1))


def train_adapted_model(
    model: nn.Module,
    train_loader: Iterable[Sequence[Tensor | None]],
    epochs: int,
    learning_rate: float,
    *,
    progress: bool = True,
) -> list[float]:
    """Train what of ``model`` needs a gradient, with AdamW on the cross-entropy.

    Args:
        model: a :class:`TaskAdapter`, or what is called like one.
        train_loader: yields (tokens, labels) or (tokens, key_padding_mask, labels); ``labels``
            is (N,) int64. Tensors go to the device of the model.
        epochs: how often it is gone through.
        learning_rate: of AdamW (Loshchilov and Hutter, 2019), whose other settings are torch's.
        progress: show a bar on a terminal, by the ``rich`` package, and a line an epoch elsewhere
            or without that package.

    Returns:
        The average loss of a sequence in nats, one an epoch.

    Raises:
        ValueError: an argument does not fit, or ``train_loader`` yields nothing.
        FloatingPointError: the loss is not finite. The parameters are those before that step.
    """
    _check_positive(epochs=epochs)
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate must be positive and finite, not {learning_rate}")
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model has no parameter that needs a gradient")
    device = parameters[0].device
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
    was_training = model.training
    model.train()
    losses: list[float] = []
    try:
        for epoch in range(epochs):
            total = torch.zeros((), device=device, dtype=torch.float64)
            count = 0
            for batch in _shown(train_loader, f"epoch {epoch + 1}/{epochs}", progress):
                *inputs, labels = (None if x is None else x.to(device) for x in batch)
                loss = F.cross_entropy(model(*inputs), labels)
                if not loss.isfinite():
                    raise FloatingPointError(f"the loss of epoch {epoch + 1} is {loss.item()}")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach().double() * len(labels)
                count += len(labels)
            if count == 0:
                raise ValueError("train_loader yields nothing")
            losses.append(total.item() / count)
            if progress:
                print(f"epoch {epoch + 1}/{epochs}  loss {losses[-1]:.4f}", flush=True)
    finally:
        model.train(was_training)
    return losses


def _shown(batches: Iterable, description: str, progress: bool) -> Iterable:
    """``batches``, behind a bar where there is a terminal to show it and a package to draw it."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return batches
    console = Console()
    if not progress or not console.is_terminal:
        return batches
    return track(batches, description, console=console, transient=True)


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
