"""``FusedEncoderLayer``: torch's encoder layer, its forward run through the library's ops."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastattn import dispatch, dropout, packing
from fastattn.arguments import autocast_dtype
from fastattn.layers import inference, masks
from fastattn.layers.plain import (
    drops,
    fused_activation,
    is_plain,
    is_plain_inference,
    kind_of,
    overrides,
    why_attention_called,
    why_attention_is_module,
    why_feed_forward_called,
    why_module,
    why_norm_is_module,
    why_padded,
)
from fastattn.ops._checks import check_save
from fastattn.ops.attention import attention_packed
from fastattn.ops.bias_activation_dropout import bias_activation_dropout
from fastattn.ops.dropout_add import dropout_add
from fastattn.ops.dropout_add_layer_norm import dropout_add_layer_norm
from fastattn.ops.feed_forward import check_chunk_tokens, feed_forward, linear
from fastattn.ops.layer_norm import layer_norm, why_not_from_output

__all__ = ["FusedEncoderLayer"]


#: What a layer may keep for backward.
SAVE_LEVELS = ("default", "lean", "recompute")


class Layout(NamedTuple):
    """How a layer's tokens lie in memory: batch-first, sequence-first, or packed."""

    batch_first: bool
    row_index: Tensor | None = None  # (T,) int32, packed: row in the padded batch
    row_period: int | None = None
    cu_seqlens: Tensor | None = None  # (B + 1,) int32
    max_seqlen: int = 0

    @property
    def rows(self) -> dict[str, Any]:
        return {
            "row_index": self.row_index,
            "row_period": self.row_period,
            "batch_first": self.batch_first,
        }


class Branch(NamedTuple):
    """A residual branch before its dropout: the last linear's bias is left to the next op."""

    output: Tensor
    bias: Tensor | None
    dropout: nn.Module | None  # None: already applied


class FusedEncoderLayer(nn.TransformerEncoderLayer):
    """A drop-in ``torch.nn.TransformerEncoderLayer`` that trains faster and in less memory.

    Post-norm: x = LN1(x + dropout(MHA(x))); x = LN2(x + dropout(W2 dropout(act(W1 x + b1)) + b2)).
    Pre-norm (``norm_first``): x = x + dropout(MHA(LN1(x))), then the same with LN2 and the
    feed-forward block (Vaswani et al., 2017; Xiong et al., 2020).

    The constructor, ``state_dict``, masks and errors are those of the parent class; in addition
    fully masked rows give attention output 0 on every path. A submodule that is more than its
    plain weights (hooks, parametrisations, wrappers, subclasses, sharded weights) is called as a
    module, and what remains is fused; :func:`fastattn.explain` says which.

    Under dropout, which elements drop is a pure function of a seed (:mod:`fastattn.dropout`), drawn
    once per call from torch's generator, or given to ``forward``.

    Args:
        save: what backward keeps, of the library's own: ``"default"``; or ``"lean"``, with which
            both norms keep their result, which the linear layers after them keep anyway, instead
            of the sum before it, and under autocast only a 16-bit copy. In 16 bits that is
            4 d_model bytes a token less, under autocast 6, with ``norm_first`` 8. Backward then
            divides by the norms' weights; whether these allow it is checked where ``save`` is
            assigned and after ``load_state_dict``; a norm whose weights do not keeps its sum, with
            a warning. Weights that come close to zero later give wrong gradients: assign ``save``
            again to have them checked. There are no second derivatives. Or ``"recompute"``: as
            ``"lean"``, and the feed-forward block keeps only its input, in 16 bits
            2 dim_feedforward bytes a token less for one more product.
        chunk_tokens: let the feed-forward block handle so many tokens at a time; with
            ``"recompute"`` no tensor of the width dim_feedforward then has more rows than that,
            and steps fit whose temporary tensors would not. None: all at once.

    The other arguments are those of the parent class.
    """

    #: Index of this layer in its stack; it numbers the dropout sites.
    layer_index = 0

    _save = "default"
    _chunk_tokens: int | None = None
    _from_output: frozenset[str] = frozenset()  # the norms that keep their result

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        save: str = "default",
        chunk_tokens: int | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype,
        )  # fmt: skip
        self.save = save
        self.chunk_tokens = chunk_tokens
        self.register_load_state_dict_post_hook(_check_norms)

    @property
    def save(self) -> str:
        """What backward keeps: ``"default"``, ``"lean"`` or ``"recompute"``."""
        return self._save

    @save.setter
    def save(self, level: str) -> None:
        check_save(level, SAVE_LEVELS)
        self._save = level
        _check_norms(self)

    @property
    def chunk_tokens(self) -> int | None:
        """Tokens that the feed-forward block handles at a time; None: all."""
        return self._chunk_tokens

    @chunk_tokens.setter
    def chunk_tokens(self, tokens: int | None) -> None:
        check_chunk_tokens(tokens)
        self._chunk_tokens = tokens

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        seed: Tensor | None = None,
    ) -> Tensor:
        """Encode ``src``.

        Args:
            src: (N, S, E) with ``batch_first``, else (S, N, E); (S, E) without a batch; or a
                nested tensor of (length, E) sequences, without masks.
            src_mask: (S, S) or (N * nhead, S, S), bool (True: do not attend) or float (added).
            src_key_padding_mask: (N, S), or (S,) without a batch, bool (True: ignore) or float.
            is_causal: torch's hint that ``src_mask`` is causal; see
                ``torch.nn.MultiheadAttention``.
            seed: (1,) int64 on ``src``'s device: fixes every dropout decision of this call.

        Returns:
            The shape of ``src``. A row whose keys are all masked attends to nothing: its attention
            output is 0.

        Raises:
            AssertionError, RuntimeError: as the parent class, in its words.
            TypeError, ValueError: ``seed`` is not one int64 in a tensor.
        """
        if not isinstance(src, Tensor):
            raise TypeError(f"src must be a Tensor, not {type(src).__name__}")
        if not src.is_floating_point():
            raise RuntimeError(f"src must be floating point, but got {src.dtype}")
        if seed is not None and dropout.check_seed(seed).device != src.device:
            raise ValueError(f"seed must be on {src.device}, but got {seed.device}")
        if src.is_nested:
            return self._forward_nested(src, src_mask, src_key_padding_mask, is_causal, seed)
        self._check_source(src)
        layout = Layout(self.self_attn.batch_first)
        batch, length = self._batch_and_length(src)
        canonical = masks.canonical(
            src_mask,
            src_key_padding_mask,
            is_causal,
            batch=batch,
            heads=self.self_attn.num_heads,
            length=length,
            batched=src.dim() == 3,
        )
        if is_plain_inference(self, src):
            why = "nothing drops and no gradient can be asked for"
            dispatch.note("encoder_layer", "pytorch", {"op by op": why})
            activation, _ = fused_activation(self.activation)
            return inference.encoder_layer_inference(self, src, canonical, activation)
        call = _Call(self, layout, canonical, (src_mask, src_key_padding_mask, is_causal), seed)
        return call.run(src)

    def _check_source(self, src: Tensor) -> None:
        if src.dim() not in (2, 3):
            raise AssertionError(
                "query should be unbatched 2D or batched 3D tensor "
                f"but received {src.dim()}-D query tensor"
            )
        width, heads = self.self_attn.embed_dim, self.self_attn.num_heads
        if width % heads:
            raise AssertionError(f"embed_dim {width} not divisible by num_heads {heads}")
        if src.shape[-1] == width:
            return
        if self.norm_first:
            raise RuntimeError(
                f"Given normalized_shape=[{width}], expected input with shape [*, {width}], "
                f"but got input of size{list(src.shape)}"
            )
        raise AssertionError(
            f"was expecting embedding dimension of {width}, but got {src.shape[-1]}"
        )

    def _batch_and_length(self, src: Tensor) -> tuple[int, int]:
        if src.dim() == 2:
            return 1, src.shape[0]
        batch, length = src.shape[:2] if self.self_attn.batch_first else src.shape[1::-1]
        return batch, length

    def _forward_nested(
        self,
        src: Tensor,
        src_mask: Tensor | None,
        src_key_padding_mask: Tensor | None,
        is_causal: bool,
        seed: Tensor | None,
    ) -> Tensor:
        """Sequences without padding: packed where both blocks are ours, else padded."""
        if src_mask is not None or src_key_padding_mask is not None or is_causal:
            raise RuntimeError(
                "src_mask, src_key_padding_mask and is_causal are not supported with a nested src"
            )
        sequences = src.unbind()
        lengths = [sequence.shape[0] for sequence in sequences]
        if why_padded(self) is not None:
            return self._forward_padded(sequences, lengths, src, seed)
        longest = max(lengths, default=0)
        tokens = torch.cat(sequences)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(src.device, torch.int32)
        layout = Layout(
            batch_first=True,
            row_index=packing.row_index(cu_seqlens, tokens.shape[0], longest),
            row_period=longest,
            cu_seqlens=cu_seqlens,
            max_seqlen=longest,
        )
        out = _Call(self, layout, masks.Masks(), (None, None, False), seed).run(tokens)
        return _nested_like(src, out.split(lengths))

    def _forward_padded(
        self, sequences: tuple[Tensor, ...], lengths: list[int], src: Tensor, seed: Tensor | None
    ) -> Tensor:
        batch_first = self.self_attn.batch_first
        padded = nn.utils.rnn.pad_sequence(sequences, batch_first=batch_first)
        longest = padded.shape[1 if batch_first else 0]
        ends = torch.tensor(lengths, device=src.device)[:, None]
        padding = torch.arange(longest, device=src.device) >= ends
        out = FusedEncoderLayer.forward(self, padded, None, padding, seed=seed)
        rows = out if batch_first else out.transpose(0, 1)
        return _nested_like(src, [row[:n] for row, n in zip(rows, lengths, strict=True)])


def _nested_like(src: Tensor, sequences: Any) -> Tensor:
    return torch.nested.as_nested_tensor(list(sequences), layout=src.layout)


class _Call:
    """One forward of a layer: what its blocks share."""

    def __init__(
        self,
        layer: FusedEncoderLayer,
        layout: Layout,
        canonical: masks.Masks,
        given: tuple[Tensor | None, Tensor | None, bool],
        seed: Tensor | None,
    ) -> None:
        self.layer = layer
        self.layout = layout
        self.masks = canonical
        self.given = given
        self.seed = seed

    def run(self, x: Tensor) -> Tensor:
        layer = self.layer
        if self.seed is None and drops(layer):
            self.seed = dropout.draw_seed(x.device)
        if layer.norm_first:
            low = self.product_dtype(x, why_attention_called)
            branch = self.attention(self.norm("norm1", x, low))
            low = self.product_dtype(x, why_feed_forward_called)
            sites = (dropout.RESIDUAL_1, "dropout1")
            x, normed, _ = self.add_norm(branch, x, "norm2", *sites, out_dtype=low)
            del branch
            return self.add(self.feed_forward(normed), x, dropout.RESIDUAL_2, "dropout2")
        branch = self.attention(x)
        low = self.product_dtype(x, why_feed_forward_called)
        sites = (dropout.RESIDUAL_1, "dropout1")
        _, x, copy = self.add_norm(branch, x, "norm1", *sites, copy_dtype=low)
        del branch  # so that the feed-forward block may have its memory
        branch = self.feed_forward(x if copy is None else copy)
        del copy
        keeps_copy = torch.is_grad_enabled() and "norm2" in layer._from_output
        low = autocast_dtype(x) if keeps_copy else None
        sites = (dropout.RESIDUAL_2, "dropout2")
        return self.add_norm(branch, x, "norm2", *sites, copy_dtype=low)[1]

    # The two branches ----------------------------------------------------------------------

    def attention(self, x: Tensor) -> Branch:
        layer, attn = self.layer, self.layer.self_attn
        src_mask, padding, is_causal = self.given
        if overrides(layer, "_sa_block"):
            dispatch.note("_sa_block", "module", {"fused": "the layer overrides it"})
            given = (_as_float(src_mask, x), _as_float(padding, x))
            return Branch(layer._sa_block(x, *given, is_causal=is_causal), None, None)
        reason = why_attention_is_module(layer)
        if reason is not None:
            dispatch.note("self_attn", "module", {"fused": reason})
            return Branch(self._attention_module(x), None, layer.dropout1)
        heads = attn.num_heads
        qkv = linear(x, attn.in_proj_weight, attn.in_proj_bias)
        qkv = qkv.unflatten(-1, (3, heads, attn.embed_dim // heads))
        packed = self.layout.cu_seqlens is not None
        sequence_first = not packed and x.dim() == 3 and not self.layout.batch_first
        if sequence_first:
            qkv = qkv.transpose(0, 1)
        elif not packed and x.dim() == 2:
            qkv = qkv[None]
        p = attn.dropout if attn.training else 0.0
        out = attention_packed(
            qkv,
            key_padding_mask=self.masks.key_padding_mask,
            attn_mask=self.masks.attn_mask,
            is_causal=self.masks.is_causal,
            cu_seqlens=self.layout.cu_seqlens,
            max_seqlen=self.layout.max_seqlen,
            dropout_p=p,
            seed=self.seed,
            site=self.site(dropout.ATTENTION),
        )
        del qkv  # where nothing is saved for backward, the next product may have its memory
        out = out.transpose(0, 1) if sequence_first else out
        out = out.reshape(x.shape)
        return Branch(*self.last_linear(attn.out_proj, "self_attn.out_proj", out), layer.dropout1)

    def _attention_module(self, x: Tensor) -> Tensor:
        layer = self.layer
        src_mask, padding, is_causal = self.given
        return layer.self_attn(
            x,
            x,
            x,
            attn_mask=_as_float(src_mask, x),
            key_padding_mask=_as_float(padding, x),
            need_weights=False,
            is_causal=is_causal,
        )[0]

    def feed_forward(self, x: Tensor) -> Branch:
        layer = self.layer
        if overrides(layer, "_ff_block"):
            dispatch.note("_ff_block", "module", {"fused": "the layer overrides it"})
            return Branch(layer._ff_block(x), None, None)
        activation, no_activation = fused_activation(layer.activation)
        linear1, linear2 = layer.linear1, layer.linear2
        reasons = {
            "linear1": why_module(linear1, nn.Linear),
            "dropout": why_module(layer.dropout, nn.Dropout),
            "linear2": why_module(linear2, nn.Linear),
            "activation": no_activation,
        }
        p = layer.dropout.p if reasons["dropout"] is None and layer.dropout.training else 0.0
        options = {
            "dropout_p": p,
            "seed": self.seed,
            "site": self.site(dropout.ACTIVATION),
            **self.layout.rows,
        }
        if not any(reasons.values()):
            weights = (linear1.weight, linear1.bias, linear2.weight)
            out = feed_forward(
                x,
                *weights,
                activation=activation,
                save="input" if layer.save == "recompute" else "hidden",
                chunk_tokens=layer.chunk_tokens,
                **options,
            )
            return Branch(out, linear2.bias, layer.dropout2)
        for part in ("linear1", "activation", "dropout"):
            if reasons[part] is not None:
                dispatch.note(part, "module", {"fused": reasons[part]})
        if activation and reasons["linear1"] is None and is_plain(x):
            hidden, bias = F.linear(x, linear1.weight), linear1.bias
        else:
            hidden, bias = linear1(x), None
        if activation is None:
            hidden, activation = layer.activation(hidden), "identity"
        if not is_plain(hidden):  # such as a sharded linear's result
            dispatch.note("dropout", "module", {"fused": f"its input is a {kind_of(hidden)}"})
            if activation != "identity":
                hidden = layer.activation(hidden)
            hidden = layer.dropout(hidden)
        else:
            hidden = bias_activation_dropout(hidden, bias, activation=activation, **options)
            if reasons["dropout"] is not None:
                hidden = layer.dropout(hidden)
        return Branch(*self.last_linear(linear2, "linear2", hidden), layer.dropout2)

    def last_linear(self, linear: nn.Module, name: str, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``linear(x)`` without its bias, which is left to the next op, where it is plain."""
        reason = why_module(linear, nn.Linear, NonDynamicallyQuantizableLinear)
        if reason is not None:
            dispatch.note(name, "module", {"fused": reason})
            return linear(x), None
        return F.linear(x, linear.weight), linear.bias

    def product_dtype(self, x: Tensor, why_called: Callable[..., str | None]) -> torch.dtype | None:
        """The dtype in which autocast wants the input of a block that is not called as a module."""
        dtype = autocast_dtype(x)
        return None if dtype is None or why_called(self.layer) else dtype

    # What follows a branch -----------------------------------------------------------------

    def norm(self, name: str, x: Tensor, out_dtype: torch.dtype | None) -> Tensor:
        """LN(x), in ``out_dtype`` where autocast would cast it so for the next product."""
        norm = getattr(self.layer, name)
        reason = why_norm_is_module(self.layer, norm)
        if reason is None:
            save = "output" if self.keeps_output(name, norm) else "input"
            affine = (norm.weight, norm.bias, norm.eps)
            return layer_norm(x, *affine, out_dtype=out_dtype, save=save)
        dispatch.note(name, "module", {"fused": reason})
        return norm(x)

    def keeps_output(self, name: str, norm: nn.LayerNorm) -> bool:
        """Whether backward of a norm starts from its result."""
        return name in self.layer._from_output or getattr(norm, "keeps_output", False)

    def add_norm(
        self,
        branch: Branch,
        residual: Tensor,
        norm_name: str,
        kind: int,
        dropout_name: str,
        out_dtype: torch.dtype | None = None,
        copy_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """(the sum where pre-norm needs it, its norm, a copy of that where its dtype differs)."""
        norm = getattr(self.layer, norm_name)
        reason = why_norm_is_module(self.layer, norm)
        if reason is not None:
            dispatch.note(norm_name, "module", {"fused": reason})
            total = self.add(branch, residual, kind, dropout_name)
            return total, norm(total), None
        output, bias, options = self._drop(branch, kind, dropout_name)
        if copy_dtype == torch.promote_types(output.dtype, residual.dtype):
            copy_dtype = None
        want_sum, save = self.layer.norm_first, "sum"
        if self.keeps_output(norm_name, norm):
            lean = norm_name in self.layer._from_output
            save = "copy" if lean and copy_dtype is not None else "output"
        result = dropout_add_layer_norm(
            output,
            residual,
            norm.weight,
            norm.bias,
            norm.eps,
            input_bias=bias,
            return_sum=want_sum,
            out_dtype=out_dtype,
            copy_dtype=copy_dtype,
            save=save,
            **options,
        )
        if want_sum:
            return result[1], result[0], None
        return (None, result, None) if copy_dtype is None else (None, *result)

    def add(self, branch: Branch, residual: Tensor, kind: int, name: str) -> Tensor:
        output, bias, options = self._drop(branch, kind, name)
        return dropout_add(output, residual, input_bias=bias, **options)

    def _drop(self, branch: Branch, kind: int, name: str) -> tuple[Tensor, Tensor | None, dict]:
        """The branch's output and bias, and what its op needs to drop it."""
        output, bias, module = branch
        p = 0.0
        if module is not None:
            reason = why_module(module, nn.Dropout)
            if reason is None:
                p = module.p if module.training else 0.0
            else:
                dispatch.note(name, "module", {"fused": reason})
                output, bias = module(output if bias is None else output + bias), None
        options = {"dropout_p": p, "seed": self.seed, "site": self.site(kind), **self.layout.rows}
        return output, bias, options

    def site(self, kind: int) -> int:
        return dropout.site_of(self.layer.layer_index, kind)


# ------------------------------------------------------------------------------ what may be fused


def _check_norms(layer: FusedEncoderLayer, incompatible_keys: object = None) -> None:
    """Settle which norms' backward may start from their result."""
    if layer.save == "default":
        layer._from_output = frozenset()
        return
    allowed = []
    for name in ("norm1", "norm2"):
        norm = getattr(layer, name)
        if why_norm_is_module(layer, norm) is not None:
            continue
        reason = why_not_from_output(norm.weight, norm.bias)
        if reason is None:
            allowed.append(name)
        else:
            warnings.warn(
                f"{name} keeps its sum for backward, not its result: {reason}", stacklevel=3
            )
    layer._from_output = frozenset(allowed)


def _as_float(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask as torch's own blocks get it: float, -inf where a bool mask is True."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, float("-inf"))
