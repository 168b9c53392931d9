"""BatchNorm over the statistics of the global batch, each worker weighing by what it holds.

Workers with more samples count for more, a worker with none (a filler) not at all, so that running statistics and
gradients are those of one process (Ioffe & Szegedy 2015, over the whole batch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from hvdlm.adapters.torch_wire import TorchWire
from hvdlm.plan import Share

__all__ = ["SyncBatchNorms"]


class SyncBatchNorms:
    """Makes the BatchNorm modules of some models use global statistics while they train.

    The modules stay as they are (and can be saved as they are): ``_BatchNorm.forward`` is replaced for these instances
    until :meth:`remove`.

    Args:
        models: Models whose BatchNorm modules to take in.
        wire: Collectives.
        share: The current share, None if there is no training loader.
        size: Number of workers.
        mean: Whether the loss is a mean over samples, so that a worker's gradients weigh by its share.
    """

    def __init__(
        self,
        models: Iterable[torch.nn.Module],
        wire: TorchWire,
        share: Callable[[], Share | None],
        *,
        size: int,
        mean: bool,
    ) -> None:
        self._names: dict[int, str] = {}
        for number, model in enumerate(models):
            for name, module in model.named_modules():
                if isinstance(module, _BatchNorm):
                    self._names.setdefault(id(module), f"hvdlm.batchnorm.{number}.{name}")
        self._wire, self._share, self._size, self._mean = wire, share, size, mean
        self._original = _BatchNorm.forward
        if self._names:
            original, names, forward = self._original, self._names, self._forward

            def patched(module: _BatchNorm, input: torch.Tensor) -> torch.Tensor:
                if id(module) in names and module.training and torch.is_grad_enabled():
                    return forward(module, input)
                return original(module, input)

            _BatchNorm.forward = patched  # type: ignore[method-assign,assignment]  # until remove()

    def remove(self) -> None:
        """Give the modules their own forward back."""
        _BatchNorm.forward = self._original  # type: ignore[method-assign]  # its own again

    def _forward(self, module: _BatchNorm, input: torch.Tensor) -> torch.Tensor:
        module._check_input_dim(input)  # type: ignore[no-untyped-call]  # torch gives it no types
        share = self._share()
        counted = share is None or not share.is_filler
        if self._mean:
            weight = 1.0 / self._size if share is None else share.count / share.total
        else:
            weight = float(counted)
        output, mean, variance, count = _SyncNormalise.apply(  # type: ignore[no-untyped-call]  # torch gives it no types
            input, module.weight, module.bias, module.eps, counted, weight, self._wire, self._names[id(module)]
        )
        if module.track_running_stats and module.running_mean is not None and module.running_var is not None:
            assert module.num_batches_tracked is not None
            module.num_batches_tracked.add_(1)
            momentum = module.momentum
            momentum = 1.0 / float(module.num_batches_tracked) if momentum is None else momentum
            unbiased = variance * (count / (count - 1).clamp(min=1))
            module.running_mean.lerp_(mean.to(module.running_mean.dtype), momentum)
            module.running_var.lerp_(unbiased.to(module.running_var.dtype), momentum)
        result: torch.Tensor = output
        return result


class _SyncNormalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        gamma: torch.Tensor | None,
        beta: torch.Tensor | None,
        eps: float,
        counted: bool,
        weight: float,
        wire: TorchWire,
        name: str,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        axes = [0, *range(2, input.dim())]
        shape = [1, -1] + [1] * (input.dim() - 2)
        wide = input.detach().double()  # sums of squares cancel in single precision
        channels = wide.shape[1]
        sums = torch.zeros(2 * channels + 1, dtype=torch.float64, device=input.device)
        if counted:
            sums[:channels] = wide.sum(axes)
            sums[channels:-1] = (wide * wide).sum(axes)
            sums[-1] = wide.numel() / channels
        wire.wait(wire.start(sums, f"{name}.forward"))
        count = sums[-1]
        mean = sums[:channels] / count
        variance = (sums[channels:-1] / count - mean * mean).clamp(min=0)
        scale = (variance + eps).rsqrt()
        normal = ((wide - mean.view(shape)) * scale.view(shape)).to(input.dtype)
        ctx.save_for_backward(normal, gamma, scale)
        ctx.counted, ctx.weight, ctx.wire, ctx.name = counted, weight, wire, name
        ctx.axes, ctx.shape, ctx.count = axes, shape, count
        output = normal
        if gamma is not None:
            output = output * gamma.view(shape)
        if beta is not None:
            output = output + beta.view(shape)
        ctx.mark_non_differentiable(mean, variance, count)
        return output if output is not normal else normal.clone(), mean, variance, count

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
        normal, gamma, scale = ctx.saved_tensors
        axes, shape, weight = ctx.axes, ctx.shape, ctx.weight
        grad_gamma = (grad * normal).sum(axes) if gamma is not None else None
        grad_beta = grad.sum(axes) if ctx.needs_input_grad[2] else None
        inner = (grad if gamma is None else grad * gamma.view(shape)).double()
        channels = normal.shape[1]
        sums = torch.zeros(2 * channels, dtype=torch.float64, device=grad.device)
        if ctx.counted:
            # The reducer weighs this worker's gradients afterwards: the other workers' part of the global sum is
            # weighed here, and divided by this worker's weight to meet that.
            sums[:channels] = weight * inner.sum(axes)
            sums[channels:] = weight * (inner * normal).sum(axes)
        ctx.wire.wait(ctx.wire.start(sums, f"{ctx.name}.backward"))
        if not ctx.counted:
            return torch.zeros_like(grad), grad_gamma, grad_beta, None, None, None, None, None
        sums /= ctx.count * weight
        grad_input = inner - sums[:channels].view(shape) - normal * sums[channels:].view(shape)
        return (grad_input * scale.view(shape)).to(grad.dtype), grad_gamma, grad_beta, None, None, None, None, None
