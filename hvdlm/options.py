"""Every option of a distributed run: one frozen value, checked where it is made.

Precedence, highest first: command-line flag, ``--config-file``, the decorator's or call's argument, ``HVDLM_*`` in the
environment, default. :func:`resolve` applies it and remembers where each value came from.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hvdlm.errors import ConfigError
from hvdlm.option_checks import check
from hvdlm.option_values import close, named, numbers, spelled, takes_function

__all__ = ["ORIGINS", "Options", "Resolved", "choices", "coerce", "lr_factor", "names", "resolve"]

ORIGINS = ("default", "environment", "code", "config file", "command line")
"""Where a value can come from, lowest precedence first."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What hvdlm does with a training run.

    >>> Options(compression="fp16").partition
    'hash'

    Raises:
        ConfigError: A value is of the wrong type or not among those allowed.
    """

    partition: Literal["hash", "random", "contiguous", "none"] = "hash"
    """Who computes which part of a global batch: by hash of the sample id, or by its place in the batch. ``random``
    also shuffles a loader that does not; ``none`` gives every worker every sample."""
    compression: Literal["none", "fp16", "bf16", "int8", "powersgd", "topk", "auto"] = "none"
    """How gradients travel: as they are; as half floats, scaled so that they cannot overflow where fp32 would not; as
    bytes under a scale for each block; as products of thin matrices; or only the largest. What these three drop is
    added to the next gradient. ``auto`` measures and chooses."""
    powersgd_rank: int = 4
    """With ``compression="powersgd"``: columns of the thin matrices. More are closer to the gradient and larger."""
    topk_ratio: float = 0.01
    """With ``compression="topk"``: the part of the gradient that is sent at each step."""
    compression_warmup_steps: int = 0
    """So many gradients travel as they are first, and are compressed from then on (as PyTorch's PowerSGD does)."""
    exact: bool = False
    """Refuse every option that sends less than the whole gradient."""
    sync: Literal["global", "local", "auto"] = "global"
    """When workers agree: ``global`` on gradients, at every backward; ``local`` on parameters, every ``sync_every``
    steps, and each worker trains on its own in between; ``auto`` begins with the first, measures, and goes over to the
    second where steps would take a quarter longer. With ``exact`` it stays."""
    sync_every: int = 50
    """With ``sync="local"``: optimizer steps between two synchronisations."""
    sync_warmup_steps: int = 0
    """With ``sync="local"``: so many optimizer steps are first made together, as under ``global``. A model that has
    found its way loses less by parting (post-local SGD, Lin et al. 2020; DiLoCo too starts from a trained model)."""
    outer_optimizer: Literal["none", "nesterov"] = "none"
    """With ``sync="local"``: ``none`` averages the parameters; ``nesterov`` steps along the average move, with momentum
    (DiLoCo)."""
    outer_lr: float = 0.7
    """Learning rate of the outer optimizer."""
    outer_momentum: float = 0.9
    """Momentum of the outer optimizer."""
    local_group: Literal["worker", "host"] = "worker"
    """With ``sync="local"``: who trains on its own: each worker, or each host, whose workers sum gradients at every
    backward."""
    local_moments: Literal["keep", "average"] = "keep"
    """With ``sync="local"``: whether the state of optimizers stays each worker's own, or is averaged too."""
    prune: Literal["none", "magnitude"] = "none"
    """Whether the smallest weights become zero for good, more of them as training goes on; neither they nor their
    gradients are sent."""
    prune_sparsity: float = 0.8
    """Part of the weights that ends up as zeros."""
    prune_pattern: str = ""
    """As in ``2:4``: so many are kept of each group of so many along a row, in the place of ``prune_sparsity``."""
    prune_begin: int = 0
    """First optimizer step at which masks are made."""
    prune_end: int = 1000
    """Step at which the last masks are made."""
    prune_every: int = 100
    """Steps between masks."""
    prune_scope: Literal["global", "layer"] = "global"
    """Whether the smallest are sought among all weights or in each matrix."""
    prune_exclude: str = ""
    """Names of parameters that are not pruned: patterns as of a shell, joined by commas."""
    reduction: Literal["mean", "sum"] = "mean"
    """``mean`` for losses that are means over samples, ``sum`` for losses that are sums."""
    balance: Literal["none", "static", "dynamic"] = "none"
    """How shares follow the speed of workers: ``none`` gives equal shares, ``static`` those of ``weights`` or of a
    calibration at the start, ``dynamic`` follows the time that each worker computes."""
    weights: tuple[float, ...] = ()
    """Relative speed of each worker in rank order, as in 1,1,2,4; 0 for one that computes nothing. With
    ``balance="dynamic"`` what it starts from."""
    key: str | Callable[[int], Any] = "none"
    """What places a sample under ``partition="hash"``: a column of the data set's rows, or a function of the sample's
    index; samples of equal key (the chunks of a document) have one home. ``none``: the index itself. It never changes
    which samples make up a batch."""
    weight: Literal["auto", "samples"] | Callable[[Any], float] = "auto"
    """What a worker's gradient counts by under ``reduction="mean"``: ``samples``; ``auto``: targets that are not -100
    where a batch has integer ``labels``, else samples; or a function that counts what the loss is a mean over."""
    batch: Literal["global", "per_worker"] = "global"
    """Whether the loader's batch size is that of the whole job or that of each worker."""
    lr_scale: Literal["none", "linear", "sqrt"] = "none"
    """How the learning rate grows with the global batch; only of use with ``batch="per_worker"``."""
    lr_warmup_steps: int = 0
    """Optimizer steps in which the learning rate grows from what the script says to what ``lr_scale`` makes of it."""
    eval: Literal["whole", "sharded"] = "whole"
    """Whether loaders read in eval mode are read whole by every worker or shared out."""
    batch_norm: Literal["sync", "local"] = "sync"
    """Whether BatchNorm uses the statistics of the global batch or those of each worker's share."""
    elastic: bool = False
    """Whether workers may come and go."""
    commit_every: str = "10s"
    """With ``elastic``: how often the state is copied in memory, in steps (``50``) or time (``10s``, ``2m``)."""
    checkpoint_dir: str = ""
    """Where durable checkpoints are written: a directory, or a URL that fsspec knows; none if empty."""
    checkpoint_every: str = "10m"
    """How often one is written, in steps (``1000``) or time (``90s``, ``10m``, ``1h``)."""
    checkpoint_keep: int = 3
    """How many are kept, the newest ones."""
    resume: Literal["no", "yes", "auto"] = "no"
    """Whether to go on from the newest whole checkpoint: ``yes`` requires one, ``auto`` starts afresh without."""
    seed: int = 0
    """Seed of the data order and of each step's random streams (dropout)."""
    fingerprint_every: int = 100
    """Steps between two comparisons of the replicas, bit for bit; 0 compares at the end only."""
    on_divergence: Literal["stop", "resync", "warn"] = "stop"
    """What to do when replicas differ: end the job, give all the state that most ranks hold, or only tell."""
    timings_every: int = 20
    """Steps between two exchanges of what each rank's time goes into; 0 for never."""
    metrics: Literal["none", "wandb", "mlflow", "prometheus"] = "none"
    """Where loss, throughput and times go besides the run directory; ``prometheus`` is a page on loopback."""
    watchdog_seconds: float = 60.0
    """How long workers may wait in a collective before hvdlm tells who is missing and where it is; 0 never tells."""
    bucket_cap_mb: float = 0.0
    """Gradients travel in flat buckets of at most this many megabytes (2**20 bytes); 0 chooses by measuring."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, coerce(field.name, getattr(self, field.name)))
        check(self)

    def to_dict(self) -> dict[str, Any]:
        """All values by name, ready for JSON; a function is its name."""
        return {name: named(value) for name, value in dataclasses.asdict(self).items()}


def lr_factor(options: Options, num_workers: int) -> float:
    """What the learning rate of the script is multiplied by in a job of so many workers."""
    powers = {"none": 0.0, "sqrt": 0.5, "linear": 1.0}
    return float(num_workers ** powers[options.lr_scale])


_HINTS = typing.get_type_hints(Options)
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Options)}


def names() -> list[str]:
    """The names of all options, sorted."""
    return sorted(_HINTS)


def choices(name: str) -> tuple[str, ...] | None:
    """The values allowed for an option that has a fixed set of them, else None.

    >>> choices("reduction")
    ('mean', 'sum')
    """
    hint = spelled(_HINTS[name])
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else None


def kind(name: str) -> type:
    """The Python type of an option's value: str, bool, int, float, or tuple for a list of numbers."""
    hint = spelled(_HINTS[name])
    origin = typing.get_origin(hint)
    return str if origin is Literal else typing.cast(type, origin or hint)


def coerce(name: str, value: object) -> Any:
    """The value of one option from a flag's, file's or argument's value; strings become numbers and booleans.

    Raises:
        ConfigError: The option does not exist (lists those that do) or the value is not allowed (lists those that are).
    """
    if name not in _HINTS:
        similar = difflib.get_close_matches(name, _HINTS, n=1)
        raise ConfigError(
            f"unknown option {name!r}; the options are: {', '.join(names())}.",
            hint=f"did you mean {similar[0]!r}?" if similar else "hvdlm run --help describes each option",
        )
    if callable(value) and takes_function(_HINTS[name]):
        return value
    allowed = choices(name)
    if allowed is not None:
        if value in allowed:
            return value
        raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}.", hint=close(value, allowed))
    wanted = kind(name)
    if wanted is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        raise ConfigError(f"{name} is {value!r}; allowed: true, false.")
    if wanted is tuple:
        return numbers(name, value)
    if wanted is str:
        if isinstance(value, (str, int, float, os.PathLike)) and not isinstance(value, bool):
            return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
        raise ConfigError(f"{name} is {value!r}; it takes text{' or a function' * takes_function(_HINTS[name])}.")
    if isinstance(value, str) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        try:
            number = wanted(value)
        except (ValueError, OverflowError):
            number = None
        if number is not None and number == number and (isinstance(value, str) or number == value):
            return number
    raise ConfigError(f"{name} is {value!r}; it takes {'an integer' if wanted is int else 'a number'}.")


@dataclass(frozen=True)
class Resolved:
    """Options and where each value came from."""

    options: Options
    origins: Mapping[str, str]
    """Option name -> one of :data:`ORIGINS`."""
    overridden: tuple[str, ...] = ()
    """A sentence for each value of the code that a flag or file replaced by another."""

    def table(self) -> list[tuple[str, str, str]]:
        """Rows (name, value, origin), sorted by name."""
        values = self.options.to_dict()
        return [(name, str(values[name]), self.origins[name]) for name in names()]


def resolve(
    *,
    environment: Mapping[str, object] = types.MappingProxyType({}),
    code: Mapping[str, object] = types.MappingProxyType({}),
    config_file: Mapping[str, object] = types.MappingProxyType({}),
    command_line: Mapping[str, object] = types.MappingProxyType({}),
    host_weights: Sequence[float] = (),
) -> Resolved:
    """Merge the layers by precedence.

    Args:
        environment: Values of ``HVDLM_<NAME>`` variables, by option name.
        code: Arguments of ``distribute`` or ``wrap``.
        config_file: The content of ``--config-file``.
        command_line: Flags of ``hvdlm run``.
        host_weights: Of each rank, from the host file: ``weights`` where shares are unequal and none are given.

    Raises:
        ConfigError: An unknown name or a value that is not allowed; the message says which layer it is from.
    """
    values: dict[str, Any] = dict(_DEFAULTS)
    origins = dict.fromkeys(_DEFAULTS, "default")
    overridden = []
    for origin, layer in zip(ORIGINS[1:], (environment, code, config_file, command_line), strict=True):
        for name, given in layer.items():
            try:
                value = coerce(name, given)
            except ConfigError as error:
                raise ConfigError(f"{error.message} (given in: {origin})", hint=error.hint) from None
            if origins[name] == "code" and value != values[name]:
                overridden.append(f"{name}={value!r} from the {origin} replaces {name}={values[name]!r} in the code")
            values[name], origins[name] = value, origin
    if host_weights and values["balance"] != "none" and not values["weights"]:
        values["weights"], origins["weights"] = tuple(host_weights), "host file"
    return Resolved(Options(**values), origins, tuple(overridden))
