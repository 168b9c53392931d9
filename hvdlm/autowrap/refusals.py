"""What a script must not do by itself while hvdlm does it, and what another library is told to leave alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from hvdlm.autowrap.places import place
from hvdlm.autowrap.scope import Scope
from hvdlm.environment import alone
from hvdlm.errors import RecognitionError

__all__ = ["REFUSALS"]

Undo = Callable[[], None]


def _replace(owner: Any, name: str, value: Any) -> Undo:
    original = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, original)


def _refusing(scope: Scope, owner: Any, name: str, what: str, hint: str) -> list[Undo]:
    """Have a function raise, with the line of the script that calls it."""
    original = getattr(owner, name, None)
    if original is None:
        return []

    @functools.wraps(original)
    def refuse(*args: Any, **kwargs: Any) -> Any:
        if scope.busy:
            return original(*args, **kwargs)
        raise RecognitionError(f"{place(2)} {what}, and hvdlm would synchronise the same workers once more.", hint=hint)

    return [_replace(owner, name, refuse)]


def _torch_distributed(scope: Scope, module: ModuleType) -> list[Undo]:
    return _refusing(
        scope,
        module,
        "init_process_group",
        "starts torch.distributed (DistributedDataParallel, FSDP, DeepSpeed)",
        "run the script's single-process way (no torchrun, no --ddp flag), or take the wrapper out",
    )


def _parallel(scope: Scope, module: ModuleType) -> list[Undo]:
    undo: list[Undo] = []
    for name in ("DistributedDataParallel", "DataParallel"):
        undo += _refusing(
            scope, getattr(module, name), "__init__", f"makes a {name}", "use the plain model: hvdlm does its work"
        )
    return undo


def _lightning(scope: Scope, module: ModuleType) -> list[Undo]:
    return _refusing(
        scope,
        module.Trainer,
        "__init__",
        "makes a Lightning Trainer, which starts and synchronises workers by itself",
        "run it as it is (Trainer(devices=...)), or use a plain training loop",
    )


def _horovod(scope: Scope, module: ModuleType) -> list[Undo]:
    return _refusing(
        scope,
        module,
        "DistributedOptimizer",
        f"makes a {module.__name__}.DistributedOptimizer",
        "run it with: hvdlm run -np N, without --autowrap; or take the Horovod calls out",
    )


def _accelerate(scope: Scope, module: ModuleType) -> list[Undo]:
    """Accelerate runs as in one process; loaders stay plain, since its own read one batch ahead of the training."""

    def prepare_data_loader(self: Any, data_loader: Any, *args: Any, **kwargs: Any) -> Any:
        if data_loader not in self._dataloaders:
            self._dataloaders.append(data_loader)
        return data_loader

    begin = module.PartialState.__init__

    @functools.wraps(begin)
    def begin_alone(self: Any, *args: Any, **kwargs: Any) -> None:
        with alone():  # it would take mpirun's variables for an order to start torch.distributed
            begin(self, *args, **kwargs)

    return [
        _replace(module.Accelerator, "prepare_data_loader", prepare_data_loader),
        _replace(module.PartialState, "__init__", begin_alone),
    ]


def _transformers_trainer(scope: Scope, module: ModuleType) -> list[Undo]:
    """The Trainer runs as in one process, and writes on rank 0."""
    trainer = module.Trainer
    undo = []

    def on_main(name: str) -> None:
        original = getattr(trainer, name, None)
        if original is None:
            return

        @functools.wraps(original)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if scope.session("torch").world.is_main:
                return original(self, *args, **kwargs)
            return None

        undo.append(_replace(trainer, name, method))

    for name in ("save_model", "_save_checkpoint", "_save_optimizer_and_scheduler", "save_state", "save_metrics"):
        on_main(name)
    world_zero = trainer.is_world_process_zero

    @functools.wraps(world_zero)
    def is_world_process_zero(self: Any) -> bool:
        return bool(scope.session("torch").world.is_main)

    undo.append(_replace(trainer, "is_world_process_zero", is_world_process_zero))
    return undo


REFUSALS: dict[str, Callable[[Scope, ModuleType], list[Undo]]] = {
    "torch.distributed": _torch_distributed,
    "torch.nn.parallel": _parallel,
    "lightning": _lightning,
    "pytorch_lightning": _lightning,
    "horovod.torch": _horovod,
    "horovod.tensorflow.keras": _horovod,
    "horovod.keras": _horovod,
    "accelerate": _accelerate,
    "transformers.trainer": _transformers_trainer,
}
"""Module -> what is done when it has been imported; returns what undoes it."""
