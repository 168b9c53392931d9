"""Metrics over all workers.

The states of Keras's metrics are sums (totals, counts, histograms), so the sum of the states over workers is the state
of one process that saw everything: exact for accuracies and losses, and also for what no average of averages gives
(AUC, precision, root mean square).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from keras import ops

from hvdlm.contracts import Collectives

__all__ = [
    "global_results",
    "metric_variables",
    "metrics_built",
    "pooled_states",
    "put_back_states",
    "weighted_means",
]


def metric_variables(model: Any) -> list[Any]:
    """The state variables of all metrics of a model, each once."""
    return list({id(v): v for metric in model.metrics for v in metric.variables}.values())


def metrics_built(model: Any) -> bool:
    """Whether the compiled metrics and losses have their variables."""
    return all(part is None or part.built for part in (model._compile_metrics, model._compile_loss))


def global_results(model: Any, logs: Any, results: Callable[[Any], Any], collectives: Collectives, samples: int) -> Any:
    """Results of the model's metrics over what all workers saw since they were reset.

    Args:
        model: Its metrics hold this worker's states; afterwards those of the job.
        logs: What the last step returned.
        results: Keras's own function from logs to results.
        collectives: To sum with.
        samples: How many this worker saw.
    """
    local = dict(results(logs)) if isinstance(logs, dict) else {}
    custom = {m.name for m in _leaves(model.metrics) if not _is_additive(m)}
    variables = [v for m in _leaves(model.metrics) if _is_additive(m) for v in m.variables]
    variables = list({id(v): v for v in variables}.values())
    arrays = [np.asarray(ops.convert_to_numpy(v)) for v in variables]
    if arrays:
        total = collectives.allreduce(np.concatenate([a.astype(np.float64).ravel() for a in arrays]))
        at = 0
        for v, a in zip(variables, arrays, strict=True):
            v.assign(total[at : at + a.size].reshape(a.shape).astype(a.dtype))
            at += a.size
    found = results(logs)
    if not isinstance(found, dict):
        return found
    from_states = set(model.get_metrics_result())
    averaged = [name for name in found if name not in from_states or any(name.endswith(c) for c in custom)]
    if averaged:
        found = dict(found)
        means = weighted_means([float(np.asarray(local[name])) for name in averaged], collectives, samples)
        found.update(zip(averaged, means, strict=True))
    return found


def pooled_states(model: Any, collectives: Collectives) -> list[float]:
    """The states of a model's metrics over all workers, one after the other; the metrics stay as they are."""
    arrays = [np.asarray(ops.convert_to_numpy(v), dtype=np.float64).ravel() for v in metric_variables(model)]
    pooled: list[float] = collectives.allreduce(np.concatenate(arrays)).tolist() if arrays else []
    return pooled


def put_back_states(model: Any, states: Sequence[float]) -> None:
    """Give a model's metrics what :func:`pooled_states` gave; on one worker, for they will be summed again."""
    variables, at = metric_variables(model), 0
    if len(states) != sum(int(np.prod(v.shape, dtype=np.int64)) for v in variables):
        return  # other metrics than those of the run that goes on
    for v in variables:
        size = int(np.prod(v.shape, dtype=np.int64))
        v.assign(np.array(states[at : at + size]).reshape(tuple(v.shape)))
        at += size


def _leaves(metrics: Any) -> Iterator[Any]:
    for metric in metrics:
        nested = getattr(metric, "metrics", None)
        if nested:
            yield from _leaves(nested)
        else:
            yield metric


def _is_additive(metric: Any) -> bool:
    """Whether the state is a sum: so it is where Keras updates it. A person's own update may keep a maximum."""
    for cls in type(metric).__mro__:
        if "update_state" in cls.__dict__:
            return cls.__module__.split(".")[0] == "keras"
    return False


def weighted_means(values: list[float], collectives: Collectives, samples: int) -> list[float]:
    """Means of numbers, each worker weighing by its samples; one without samples may hold NaN."""
    own = np.array([samples * v if samples else 0.0 for v in values] + [samples], dtype=np.float64)
    total = collectives.allreduce(own)
    return [float(v) / total[-1] if total[-1] else float("nan") for v in total[:-1]]
