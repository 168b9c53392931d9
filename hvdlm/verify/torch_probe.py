"""What the probe sees of a PyTorch script."""

from __future__ import annotations

import functools
import gc
import math
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from hvdlm import api
from hvdlm.autowrap.places import is_own
from hvdlm.verify.probe import SAMPLES, Probe, digest
from hvdlm.verify.trace import Step

__all__ = ["TorchProbe"]


class TorchProbe:
    """Watches PyTorch in this process.

    Args:
        probe: What is written down.
        torch: The module.
    """

    def __init__(self, probe: Probe, torch: ModuleType) -> None:
        self._probe, self._torch = probe, torch
        self._depth = 0
        self._parameters: list[Any] = []
        self._step: Step | None = None

    def watch(self) -> None:
        """Start."""
        from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        torch, probe = self._torch, self._probe
        register_module_forward_pre_hook(self._enter)
        register_module_forward_hook(self._leave, always_call=True)
        register_optimizer_step_pre_hook(self._before_step)
        register_optimizer_step_post_hook(self._after_step)
        backward = torch.autograd.backward

        def watched(tensors: Any, *args: Any, **kwargs: Any) -> None:
            probe.backward()
            root = tensors if isinstance(tensors, torch.Tensor) else tensors[0]
            if root.numel() == 1:
                probe.trace.losses.append(float(root.detach()))
            backward(tensors, *args, **kwargs)

        torch.autograd.backward = watched
        torch.save = lambda value, file, *args, **kwargs: probe.trace.saved.append(str(file))  # type: ignore[attr-defined]  # while the probe runs
        probe.closing = self._close
        probe.initial = lambda model: (
            {name: self._digest(p) for name, p in model.named_parameters()}
            if isinstance(model, torch.nn.Module)
            else {}
        )
        self._watch_loaders()

    def _watch_loaders(self) -> None:
        loader, probe, torch = self._torch.utils.data.DataLoader, self._probe, self._torch
        iterate = loader.__iter__

        @functools.wraps(iterate)
        def watched(data: Any) -> Iterator[Any]:
            # Read by the script itself, and not by a loader of hvdlm's.
            if torch.is_grad_enabled() and is_own(sys._getframe(1).f_code.co_filename):
                try:
                    probe.trace.unshared = len(data)
                except TypeError:
                    probe.trace.unshared = 0
            return iterate(data)  # type: ignore[no-any-return]  # the original has no types

        loader.__iter__ = watched

    def _digest(self, tensor: Any) -> str:
        flat = tensor.detach().contiguous().cpu().reshape(-1)
        return digest(flat.view(self._torch.uint8).numpy().data) if flat.numel() else ""

    def _sample(self, tensors: list[Any]) -> tuple[float, list[float]]:
        """(2-norm of all, elements at fixed places)."""
        flat = self._torch.cat([t.detach().to_dense().double().reshape(-1) for t in tensors])
        return float(flat.norm()), flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES].tolist()

    def _enter(self, module: Any, args: Any) -> None:
        self._depth += 1
        if self._depth > 1 or not module.training or not self._torch.is_grad_enabled():
            return
        if not any(True for _ in module.parameters()):
            return
        tensors = [a for a in args if isinstance(a, self._torch.Tensor) and a.dim() and len(a)]
        trace = self._probe.trace
        trace.batches.append([self._digest(row) for row in tensors[0]] if tensors else [])
        for inner in module.modules():
            trace.dropout |= "Dropout" in type(inner).__name__ and bool(getattr(inner, "p", 0))
            trace.batch_norms |= isinstance(inner, self._torch.nn.modules.batchnorm._BatchNorm)

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        self._depth -= 1

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        trace = self._probe.trace
        trace.attempts += 1
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [p.grad for p in self._parameters if p.grad is not None]
        if not grads:
            return
        self._step = Step(optimizer.param_groups[0]["lr"], *self._sample(grads), {})
        trace.start = trace.start or self._sample(self._parameters)[1]
        names = {
            getattr(hook, "__qualname__", repr(hook))
            for p in self._parameters
            for hook in (p._backward_hooks or {}).values()
            if not getattr(getattr(hook, "func", hook), "__module__", "").startswith("hvdlm")
        }
        trace.hooks = sorted(names)
        session = api._session
        known = getattr(session.adapter, "_parameters", {}) if session is not None else {}
        if known:
            trace.unknown = [str(i) for i, p in enumerate(self._parameters) if id(p) not in known]

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        trace, step = self._probe.trace, self._step
        trace.times.append(time.perf_counter())
        if step is not None and len(trace.steps) < self._probe.limit:
            step.digests = {str(i): self._digest(p) for i, p in enumerate(self._parameters)}
            step.values = self._sample(self._parameters)[1]
            if all(math.isfinite(v) for v in (step.norm, step.lr)):
                trace.steps.append(step)
            if len(trace.steps) == 1:
                state = [v for per in optimizer.state.values() for v in per.values() if hasattr(v, "element_size")]
                trace.parameters = sum(p.numel() for p in self._parameters)
                trace.state_bytes = sum(v.numel() * v.element_size() for v in state)
        self._step = None

    def _close(self) -> None:
        mine = {id(p) for p in self._parameters}
        buffers = self._probe.trace.buffers
        for value in gc.get_objects():
            if issubclass(type(value), self._torch.nn.Module) and any(id(p) in mine for p in value.parameters()):
                kept = {n for n, _ in value.named_buffers(recurse=False)} - value._non_persistent_buffers_set
                for name in kept:
                    key = f"{type(value).__name__}.{name}"
                    buffers[key] = buffers.get(key, "") + self._digest(getattr(value, name))
