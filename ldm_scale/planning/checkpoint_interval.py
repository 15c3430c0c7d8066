"""How often to write a checkpoint: what a save costs against what a failure throws away.

Sources: J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974; J. T. Daly, "A
higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006, eq. 37.
"""

from __future__ import annotations

import math

# Llama 3: 419 unexpected interruptions in 54 days of 16,384 H100 (arXiv:2407.21783, section 3.3.4): 50,000 h each.
GPU_HOURS_PER_FAILURE = 16_384 * 54 * 24 / 419


def mean_time_between_failures_s(num_gpus: int) -> float:
    """Seconds between failures of a job on so many GPUs, at the rate of Llama 3's training."""
    return GPU_HOURS_PER_FAILURE * 3600 / num_gpus


def best_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Seconds of training between two saves that loses the least time.

    Units: seconds; `cost_s` is what training stands still for a save, `mtbf_s` the mean time between failures.
    Source: Daly 2006, eq. 37.
    """
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = cost_s / (2 * mtbf_s)
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_s


def lost_share(interval_s: float, cost_s: float, restart_s: float, mtbf_s: float) -> float:
    """Share of the time that saves, lost work and restarts take, where failures come at random at a constant rate.

    Source: Daly 2006, eq. 20 (the exact time of a job with exponentially distributed failures).
    """
    segment = math.expm1((interval_s + cost_s) / mtbf_s) * mtbf_s * math.exp(restart_s / mtbf_s)
    return 1 - interval_s / segment
