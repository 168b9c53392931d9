"""What options may be, one by one and together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvdlm.algorithms.patterns import parse_pattern
from hvdlm.algorithms.schedule import Interval
from hvdlm.errors import ConfigError

if TYPE_CHECKING:
    from hvdlm.options import Options

__all__ = ["check"]


def check(options: Options) -> None:
    """Refuse values and combinations that cannot be meant.

    Args:
        options: Values of the right types.

    Raises:
        ConfigError: Says what was given, and what is allowed.
    """
    if options.elastic and options.weights:
        raise ConfigError(
            "weights with elastic=True: the number of workers changes, and one weight each would not fit.",
            hint='set balance="dynamic" (--balance dynamic): shares follow the speed of whoever is there',
        )
    if options.exact and options.compression not in ("none", "auto"):
        raise ConfigError(
            f'exact=True with compression="{options.compression}", which rounds gradients.',
            hint='leave exact out (--no-exact), or set compression="none"',
        )
    if not 1 <= options.powersgd_rank <= 256:
        raise ConfigError(f"powersgd_rank is {options.powersgd_rank}; allowed: 1 to 256.")
    if not 0 < options.topk_ratio <= 1:
        raise ConfigError(f"topk_ratio is {options.topk_ratio}; allowed: more than 0, at most 1.")
    if options.fingerprint_every < 0:
        raise ConfigError(f"fingerprint_every is {options.fingerprint_every}; allowed: 0 (off) or more (steps).")
    if options.timings_every < 0:
        raise ConfigError(f"timings_every is {options.timings_every}; allowed: 0 (off) or more (steps).")
    if not 0 <= options.watchdog_seconds <= 86400:
        raise ConfigError(f"watchdog_seconds is {options.watchdog_seconds}; allowed: 0 (off) to 86400 (seconds).")
    for name in ("commit_every", "checkpoint_every"):
        try:
            Interval.parse(getattr(options, name))
        except ValueError:
            raise ConfigError(
                f"{name} is {getattr(options, name)!r}; allowed: steps, as in 50, or a time, as in 10s, 5m, 1h.",
                hint=f"--{name.replace('_', '-')} 10m",
            ) from None
    if options.checkpoint_keep < 1:
        raise ConfigError(f"checkpoint_keep is {options.checkpoint_keep}; allowed: 1 or more.")
    if options.resume != "no" and not options.checkpoint_dir:
        raise ConfigError(
            f'resume="{options.resume}" without a checkpoint_dir: there is nothing to resume from.',
            hint="add --checkpoint-dir DIR, the one of the run to go on with",
        )
    if options.bucket_cap_mb != 0 and not 0.001 <= options.bucket_cap_mb <= 1024:
        raise ConfigError(
            f"bucket_cap_mb is {options.bucket_cap_mb}; allowed: 0.001 to 1024 (megabytes), or 0 (measured)."
        )
    if options.lr_scale != "none" and options.batch == "global":
        raise ConfigError(
            f'lr_scale="{options.lr_scale}" with batch="global": the global batch does not grow with the workers, so '
            "the learning rate must not either.",
            hint='set batch="per_worker" (--batch per_worker) or leave lr_scale at "none"',
        )
    if options.lr_warmup_steps < 0 or (options.lr_warmup_steps and options.lr_scale == "none"):
        raise ConfigError(
            f'lr_warmup_steps is {options.lr_warmup_steps} and lr_scale="{options.lr_scale}"; allowed: 0 or more '
            "steps, and 0 without scaling.",
            hint='set lr_scale="linear" or "sqrt", or leave lr_warmup_steps out',
        )
    if options.key != "none" and options.partition != "hash":
        raise ConfigError(
            f'key with partition="{options.partition}", which does not place samples by a key.',
            hint='set partition="hash" (--partition hash) or leave key out',
        )
    if options.weights and options.balance == "none":
        raise ConfigError(
            f'weights={options.weights} with balance="none", which gives equal shares.',
            hint='set balance="static" (--balance static), or "dynamic" to start from these weights',
        )
    if options.balance != "none" and options.partition == "none":
        raise ConfigError(
            f'balance="{options.balance}" with partition="none": every worker computes every sample, so there are no '
            "shares to balance.",
            hint='set partition="hash" (--partition hash) or leave balance at "none"',
        )
    _check_warm_up(options)
    _check_sync(options)
    _check_pruning(options)


def _check_warm_up(options: Options) -> None:
    if options.compression_warmup_steps < 0:
        raise ConfigError(
            f"compression_warmup_steps is {options.compression_warmup_steps}; allowed: 0 or more (steps)."
        )
    if options.compression_warmup_steps and (options.compression == "none" or options.sync == "local"):
        raise ConfigError(
            f"compression_warmup_steps={options.compression_warmup_steps} with "
            f'compression="{options.compression}" and sync="{options.sync}": no gradient is to be compressed later.',
            hint='set a compression (--compression powersgd) and sync="global", or leave it out',
        )


def _check_sync(options: Options) -> None:
    if options.sync_every < 1:
        raise ConfigError(f"sync_every is {options.sync_every}; allowed: 1 or more (steps).")
    if options.sync_warmup_steps < 0:
        raise ConfigError(f"sync_warmup_steps is {options.sync_warmup_steps}; allowed: 0 or more (steps).")
    if options.sync_warmup_steps and options.sync != "local":
        raise ConfigError(
            f'sync_warmup_steps={options.sync_warmup_steps} with sync="{options.sync}": it says when "local" begins.',
            hint='set sync="local" (--sync local), or leave sync_warmup_steps out',
        )
    if options.sync == "global" and options.outer_optimizer != "none":
        raise ConfigError(
            f'outer_optimizer="{options.outer_optimizer}" with sync="{options.sync}": there is no outer step.',
            hint='set sync="local" (--sync local)',
        )
    if options.sync == "local" and options.exact:
        raise ConfigError(
            'exact=True with sync="local": workers that train on their own do not train what one process would.',
            hint='leave exact out, or set sync="global"',
        )
    if options.local_group == "host" and (options.sync != "local" or options.elastic):
        raise ConfigError(
            f'local_group="host" with sync="{options.sync}" and elastic={options.elastic}; it needs sync="local" and '
            "workers that stay.",
            hint='set sync="local" (--sync local) without elastic, or leave local_group out',
        )
    if options.local_group == "host" and options.sync_warmup_steps:
        raise ConfigError(
            f'local_group="host" with sync_warmup_steps={options.sync_warmup_steps}: only workers that train on their '
            "own can begin together.",
            hint="leave sync_warmup_steps or local_group out",
        )
    if not 0 < options.outer_lr <= 10:
        raise ConfigError(f"outer_lr is {options.outer_lr}; allowed: above 0, at most 10.")
    if not 0 <= options.outer_momentum < 1:
        raise ConfigError(f"outer_momentum is {options.outer_momentum}; allowed: 0 or more, below 1.")


def _check_pruning(options: Options) -> None:
    if not 0 < options.prune_sparsity < 1:
        raise ConfigError(f"prune_sparsity is {options.prune_sparsity}; allowed: above 0, below 1, as in 0.8.")
    try:
        parse_pattern(options.prune_pattern)
    except ValueError as error:
        raise ConfigError(f"prune_pattern: {error}.", hint="--prune-pattern 2:4") from None
    if not 0 <= options.prune_begin <= options.prune_end:
        raise ConfigError(
            f"prune_begin is {options.prune_begin} and prune_end {options.prune_end}; allowed: 0 <= begin <= end, in "
            "steps."
        )
    if options.prune_every < 1:
        raise ConfigError(f"prune_every is {options.prune_every}; allowed: 1 or more (steps).")
