"""Recognises PyTorch's optimizers, schedulers, loaders and models, as a script makes and uses them."""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from hvdlm.autowrap.places import place
from hvdlm.autowrap.same_data import SameData
from hvdlm.autowrap.scope import Scope
from hvdlm.contracts import Kind

__all__ = ["TorchHooks", "install", "models_of"]


def install(scope: Scope) -> list[Callable[[], None]]:
    """Watch PyTorch; returns what ends it."""
    return TorchHooks(scope).install()


class TorchHooks:
    """Watches the classes of PyTorch for one scope."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._stand_ins: dict[int, tuple[Any, Any]] = {}
        self._made_at: dict[int, str] = {}
        self._undo: list[Callable[[], None]] = []

    def _patch(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        original = owner.__dict__[name] if isinstance(owner, type) else getattr(owner, name)
        replacement = functools.wraps(original)(make(original))
        setattr(owner, name, replacement)

        def undo() -> None:
            # The adapter may have put a watch over ours, which undoes itself and then leaves ours.
            if getattr(owner, name) is replacement:
                setattr(owner, name, original)

        self._undo.append(undo)

    def install(self) -> list[Callable[[], None]]:
        """Start watching; returns what ends it."""
        self._patch(torch.optim.Optimizer, "__init__", self._noting("optimizer"))
        self._patch(LRScheduler, "__init__", self._noting("scheduler"))
        self._patch(DataLoader, "__init__", self._loader_made)
        self._patch(DataLoader, "__iter__", self._loader_read)
        self._patch(torch.nn.Module, "__call__", self._module_called)
        self._patch(torch.autograd, "backward", self._backward)
        return self._undo

    def _noting(self, kind: Kind) -> Callable[[Any], Any]:
        def make(original: Any) -> Any:
            def init(value: Any, *args: Any, **kwargs: Any) -> None:
                original(value, *args, **kwargs)
                self._scope.note(value, kind)

            return init

        return make

    def _loader_made(self, original: Any) -> Any:
        def init(loader: Any, *args: Any, **kwargs: Any) -> None:
            original(loader, *args, **kwargs)
            if not self._scope.busy:
                self._made_at[id(loader)] = place(2)

        return init

    def _loader_read(self, original: Any) -> Any:
        def iterate(loader: Any) -> Iterator[Any]:
            own = self._stand_in(loader)
            return original(loader) if own is None else iter(own)

        return iterate

    def _module_called(self, original: Any) -> Any:
        # With an optimizer at hand, a forward pass with gradients is the last moment at which all workers can be made
        # to start from the same parameters.
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            scope = self._scope
            if scope.has_pending_optimizer and not scope.busy and module.training and torch.is_grad_enabled():
                self._attach()
            return original(module, *args, **kwargs)

        return call

    def _backward(self, original: Any) -> Any:
        inside = [False]

        def backward(*args: Any, **kwargs: Any) -> Any:
            scope = self._scope
            if (
                inside[0]
                or scope.busy
                or scope.framework == "keras"
                or (scope.has_attached and not scope.has_pending_optimizer)
            ):
                return original(*args, **kwargs)
            self._attach()
            inside[0] = True
            try:
                return torch.autograd.backward(*args, **kwargs)  # with the adapter's watch over it now
            finally:
                inside[0] = False

        return backward

    def _stand_in(self, loader: Any) -> Any:
        scope = self._scope
        if scope.busy or getattr(loader, "_hvdlm_reader", False) or scope.framework == "keras":
            return None
        if id(loader) not in self._stand_ins:
            if scope.has_pending_optimizer or (not scope.has_attached and _trainable_models()):
                self._attach(data_follows=True)
            if not scope.has_attached:
                return None  # read before there is anything to train: statistics, a vocabulary
            where = f"{type(loader).__name__} at {self._made_at.get(id(loader), '?')}"
            size = loader.batch_size or "its sampler"
            line = f"{where}: {len(loader.dataset):,} samples, batches of {size}, shared out in training"
            (own,) = scope.attach("torch", [(where, "loader", loader)], iter([line]))
            scope.has_data = True
            self._stand_ins[id(loader)] = (loader, own)
        return self._stand_ins[id(loader)][1]

    def _attach(self, data_follows: bool = False) -> None:
        scope = self._scope
        pending = scope.pending()
        optimizers = [value for value, kind, _ in pending if kind == "optimizer"]
        parameters = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        models = [m for m in models_of(parameters) if not scope.is_attached(m)] if parameters else _trainable_models()
        if not models and not optimizers:
            return
        first = not scope.has_attached
        found: list[tuple[str, Kind, Any]] = [(type(model).__name__, "model", model) for model in models]
        found += [(f"{type(value).__name__} at {where}", kind, value) for value, kind, where in pending]
        scope.attach("torch", found, self._lines(found))
        if first and not data_follows and not scope.has_data:
            session = scope.session("torch")
            session.started()
            same = SameData(session, models, lambda: scope.has_data)
            self._undo.append(same.remove)

    def _lines(self, found: list[tuple[str, Kind, Any]]) -> Iterator[str]:
        options = self._scope.session("torch").resolved.options
        travel = "" if options.compression == "none" else f", {options.compression}"
        for name, kind, value in found:
            if kind == "model":
                count = sum(p.numel() for p in value.parameters())
                yield f"model {name}: {count:,} parameters, equal on all workers"
            else:
                yield f"{kind} {name}" + (f": gradients reduced{travel}" if kind == "optimizer" else "")


def models_of(parameters: Iterable[torch.Tensor]) -> list[torch.nn.Module]:
    """The outermost modules that hold some of these parameters, in the order in which the parameters come."""
    wanted = {id(p): i for i, p in enumerate(parameters)}
    holding: dict[int, tuple[int, torch.nn.Module]] = {}
    for value in gc.get_objects():
        # type(): isinstance asks objects for their class, which some compute.
        if issubclass(type(value), torch.nn.Module) and "_parameters" in value.__dict__:
            places = [wanted[id(p)] for p in value.parameters() if id(p) in wanted]
            if places:
                holding[id(value)] = (min(places), value)
    inside = {id(m) for _, value in holding.values() for m in value.modules() if m is not value}
    # A criterion or a wrapper may hold the model: the outermost one knows all buffers.
    outermost = [entry for key, entry in holding.items() if key not in inside]
    return [value for _, value in sorted(outermost, key=lambda entry: entry[0])]


def _trainable_models() -> list[torch.nn.Module]:
    """All outermost modules with parameters that require gradients; for scripts without an optimizer."""
    parameters: dict[int, torch.Tensor] = {}
    for value in gc.get_objects():
        if issubclass(type(value), torch.nn.Module) and "_parameters" in value.__dict__:
            parameters.update((id(p), p) for p in value.parameters() if p.requires_grad)
    return models_of(parameters.values())
