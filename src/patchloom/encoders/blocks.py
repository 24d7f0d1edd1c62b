"""One block of an encoder, run with less work than a plain call where that changes nothing.

Four savings, all exact: attention whose position bias is learned keeps no attention matrices on a CPU
(`LearnedBiasAttention`); what a norm or an activation gave is computed again on the way back, from what it was given,
instead of being kept beside it (a third of a block's memory for a few elementwise passes); a layer scale learns from
the gradient of the projection before it, whose output need not be kept (`LayerScaledLinear`); and a block of which
only some rows are read computes its MLP for those alone.

>>> import torch
>>> from patchloom.encoders import create_encoder
>>> encoder = create_encoder("vit_tiny_patch16_224").eval()
>>> x, rows = torch.randn(2, 197, 192), torch.zeros(2, 197, dtype=torch.bool)
>>> rows[:, :9] = True
>>> part = run_block(encoder.blocks[0], x, rows=rows)
>>> torch.allclose(part[rows], encoder.blocks[0](x)[rows], atol=1e-5)
True
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from timm.models.beit import Block as BeitBlock
from timm.models.eva import EvaBlock
from timm.models.vision_transformer import Block as ViTBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Blocks whose second half is `x + scaled(mlp(norm2(x)))`, each token by itself.
TOKENWISE_MLP = (ViTBlock, BeitBlock, EvaBlock)


def run_block(
    block: Any,
    x: Tensor,
    kwargs: Mapping[str, Any] | None = None,
    rows: Tensor | None = None,
    samples: Tensor | None = None,
    keep_all: bool = False,
) -> Tensor:
    """Return a block's output.

    Args:
        block: A block of a timm encoder.
        x: (B, L, D) tokens.
        kwargs: The block's other arguments, see `Embedded.kwargs_of`.
        rows: (B, L) bool, the tokens whose output is read; the others come without their MLP (or with it, for kinds
            of blocks that mix tokens there). Default: all.
        samples: (B, L) int64, which of the encoder's tokens x holds; needed where tokens were dropped and the block has
            a relative-position table of its own.
        keep_all: Keep what norms and activations give; within a checkpoint, which has its own way to keep nothing.
    """
    kwargs = kwargs or {}
    # To a compiler, and to what traces a model to export it, hooks and modes are obstacles.
    compiled = block._compiled_call_impl is not None or torch.compiler.is_compiling()
    on_cpu = x.device.type == "cpu" and torch.is_grad_enabled() and not compiled
    biased = on_cpu and isinstance(block, BeitBlock)
    attention: AbstractContextManager[Any] = LearnedBiasAttention() if biased else nullcontext()
    narrowed = rows is not None and isinstance(block, TOKENWISE_MLP) and not compiled
    table = nullcontext() if samples is None else _table_of(block.attn, samples)
    lean = _given_again(block) if on_cpu and not keep_all else nullcontext()
    scaled = LayerScaledLinear() if on_cpu and not keep_all else nullcontext()
    mlp = _mlp_of(block, rows) if narrowed and rows is not None else nullcontext()
    with lean, scaled, table, attention, mlp:
        output: Tensor = block(x, **kwargs)
    return output


@contextmanager
def _mlp_of(block: Any, rows: Tensor) -> Iterator[None]:
    """Let a block compute its MLP for some rows only and add nothing to the others."""
    chosen = rows.flatten().nonzero().squeeze(1)
    batch, length = rows.shape

    def narrow(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].flatten(0, 1).index_select(0, chosen),)

    def widen(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        full = output.new_zeros(batch * length, output.shape[-1])
        return full.index_copy(0, chosen, output).view(batch, length, -1)

    handles = [block.norm2.register_forward_pre_hook(narrow), block.mlp.register_forward_hook(widen)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _given_again(block: nn.Module) -> Iterator[None]:
    """Let a block keep what its norms and activations are given, for its gradients, and not also what they give."""
    given: dict[int, tuple[Tensor, nn.Module, Tensor]] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        # The output is held until the block is done, so that no other tensor can come to lie at its address.
        given[output.data_ptr()] = (output, module, inputs[0].detach())

    def pack(tensor: Tensor) -> Any:
        output, module, source = given.get(tensor.data_ptr(), (None, None, None))
        if output is None or output.numel() != tensor.numel() or not tensor.is_contiguous():
            return tensor
        return module, source, tensor.shape

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        module, source, shape = packed
        with torch.no_grad():
            again: Tensor = type(module).forward(module, source)  # past hooks, which would narrow or note it
        return again.view(shape)

    cheap = (nn.LayerNorm, nn.GELU, nn.SiLU)
    handles = [module.register_forward_hook(note) for module in block.modules() if isinstance(module, cheap)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for handle in handles:
            handle.remove()
        given.clear()


@contextmanager
def _table_of(attention: Any, samples: Tensor) -> Iterator[None]:
    """Let an attention of `Beit`, which asks itself for the bias of all tokens, have that of those that are there."""
    attention._get_rel_pos_bias = lambda: bias_of(type(attention)._get_rel_pos_bias(attention)[0], samples)
    try:
        yield
    finally:
        del attention._get_rel_pos_bias


def bias_of(bias: Tensor, samples: Tensor) -> Tensor:
    """Return a relative-position bias (heads, P + N, P + N) for the tokens in `samples`: (B, heads, P + n, P + n)."""
    return bias[:, samples.unsqueeze(2), samples.unsqueeze(1)].transpose(0, 1)


class LearnedBiasAttention(TorchFunctionMode):
    """Within it, attention with a learned bias runs fused on a CPU.

    PyTorch's fused attention for CPUs gives no gradient to the bias, so `scaled_dot_product_attention` falls back to
    keeping every (B, heads, L, L) matrix of the way. Here the forward pass is the fused one, and the backward pass
    computes the matrices anew, once, for all gradients.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Take over the attention of timm's blocks; everything else passes."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) == 3:
            bias = kwargs.get("attn_mask")
            others = {name for name, value in kwargs.items() if name != "attn_mask" and value}
            learned = bias is not None and bias.requires_grad and bias.ndim in (3, 4)
            if learned and not others and args[0].dtype == bias.dtype and bias.dtype in (torch.float32, torch.float64):
                return _BiasedAttention.apply(*args, bias if bias.ndim == 4 else bias[None])
        return func(*args, **kwargs)


class _BiasedAttention(torch.autograd.Function):
    """softmax(q kᵀ / √d + bias) v for q, k, v (B, heads, L, d) and bias (1 or B, heads, L, L)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        expanded = bias.expand(len(q), -1, -1, -1)
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=expanded)
        ctx.save_for_backward(q, k, v, bias, out, logsumexp)
        result: Tensor = out
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, bias, out, logsumexp = ctx.saved_tensors
        shape, scale = q.shape, q.shape[-1] ** -0.5
        delta = (grads[0] * out).sum(-1, keepdim=True)
        q, k, v, grad = (tensor.flatten(0, 1) for tensor in (q, k, v, grads[0]))  # (B heads, L, d)
        weights = torch.bmm(q, k.transpose(1, 2)).view(*shape[:2], *bias.shape[2:])
        weights.mul_(scale).add_(bias).sub_(logsumexp.reshape(*shape[:3], 1)).exp_()
        grad_v = torch.bmm(weights.flatten(0, 1).transpose(1, 2), grad)
        grad_scores = torch.bmm(grad, v.transpose(1, 2)).view_as(weights).sub_(delta).mul_(weights)
        grad_bias = grad_scores.sum(0, keepdim=True) if len(bias) == 1 else grad_scores
        flat = grad_scores.flatten(0, 1)
        grad_q = torch.bmm(flat, k).mul_(scale)
        grad_k = torch.bmm(flat.transpose(1, 2), q).mul_(scale)
        return grad_q.view(shape), grad_k.view(shape), grad_v.view(shape), grad_bias


class LayerScaledLinear(TorchFunctionMode):
    """Within it, a linear map followed by a learned scale of each channel (layer scale) keeps its input only.

    The scale's gradient is found without the map's output: for y = γ (W a + b), where g is the gradient of y and
    G = Σ g aᵀ over tokens, the gradient of W is γ G, row by row, and that of γ the sum of each row of G W, plus b Σ g.
    """

    def __init__(self) -> None:
        super().__init__()
        self.output: Tensor | None = None
        self.given: tuple[Any, ...] = ()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what a linear map gives, and take over its product with a scale; everything else passes."""
        kwargs = kwargs or {}
        product = self.output
        if func is Tensor.mul and len(args) == 2 and product is not None:
            scale = args[0] if args[1] is product else args[1] if args[0] is product else None
            watched = product.retains_grad or product._backward_hooks  # its own gradient is asked for
            if isinstance(scale, nn.Parameter) and not watched and _scales(scale, *self.given):
                given, self.output, self.given = self.given, None, ()
                return _LayerScaledLinear.apply(product.detach(), *given, scale)
        output = func(*args, **kwargs)
        if func is F.linear:
            plain = len(args) == 3 and not kwargs  # as `nn.Linear` calls it
            self.output, self.given = (output, args) if plain else (None, ())
        return output


def _scales(scale: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Say whether this is the case that `_LayerScaledLinear` computes, and a smaller one than the plain two steps."""
    learned = scale.requires_grad and weight.requires_grad and (bias is None or bias.requires_grad)
    kinds = {tensor.dtype for tensor in (scale, inputs, weight)}
    exact = len(kinds) == 1 and kinds <= {torch.float32, torch.float64} and not torch.is_autocast_enabled("cpu")
    return learned and exact and scale.shape == weight.shape[:1]


class _LayerScaledLinear(torch.autograd.Function):
    """γ (W a + b) for a (..., n), W (m, n), b and γ (m), given W a + b besides."""

    @staticmethod
    def forward(
        ctx: Any, product: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight, bias, scale)
        return product * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight, bias, scale = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        unscaled = grad.T @ inputs.flatten(0, -2)
        total = grad.sum(0)
        grad_scale = (unscaled * weight).sum(1) + (0 if bias is None else bias * total)
        grad_inputs = ((grad * scale) @ weight).view_as(inputs)
        return None, grad_inputs, unscaled * scale.unsqueeze(1), None if bias is None else total * scale, grad_scale
