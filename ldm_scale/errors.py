"""The closed set of errors that the project raises on purpose.

Every one of them is a user's matter: the message gives what was found, the rule and the fix, and commands
print it as one line without a traceback (`run_command`). Anything else that escapes is a defect of ours.
"""

from __future__ import annotations


class LdmScaleError(Exception):
    """Base of all errors raised on purpose; `exit_code` is the status a command ends with."""

    exit_code = 1


class ConfigError(LdmScaleError):
    """A configuration that cannot work: names the key, the value, the rule and the fix."""

    exit_code = 2


class DataError(LdmScaleError):
    """Shards, manifests or samples that cannot be used: names the file and, where it applies, the key."""

    exit_code = 3


class CheckpointError(LdmScaleError):
    """A checkpoint, artifact or export that is incomplete or does not fit: names the path and the difference."""

    exit_code = 4


class NumericsError(LdmScaleError):
    """Non-finite losses or diverged replicas: names the step and the ranks."""

    exit_code = 5


class Restart(LdmScaleError):
    """A run that stopped in good order and is to be started again: a time limit, a preemption, a hang that was ended.

    Its status is EX_TEMPFAIL of sysexits.h, on which slurm/train_ldm.sh requeues the job.
    """

    exit_code = 75
