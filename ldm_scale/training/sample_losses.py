"""Samples that could not be used, over all ranks: written down, counted, and acted on alike everywhere.

Ranks exchange what they skipped in the steps in which any skipped something; the account that follows from it is part
of the run's state, and so are the decisions (data/policy.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm_scale.config.schema import DataConfig
from ldm_scale.data import Batch, Dataset, Loader, Unindexed
from ldm_scale.data.policy import BadSampleFiles, BadSampleLog, Budgets, LossAccount, SkippedSample
from ldm_scale.engine import collectives
from ldm_scale.telemetry.log import get_logger, say_once

# Batches between the finding that a shard is bad and its quarantine: more than any loader has begun by then, so that
# where it begins does not depend on how far loaders are ahead (config/ranges.py bounds what that is made of).
QUARANTINE_DELAY_BATCHES = 256


class SampleLosses:
    """What a run does about samples that cannot be used."""

    def __init__(
        self, account: LossAccount, run_dir: Path, dataset: Dataset | Unindexed, config: DataConfig, is_main: bool
    ) -> None:
        self.account = account
        self._epoch_samples, self._shards = dataset.num_samples, dataset.shards
        self._budgets = Budgets(config.max_bad_share_of_shard, config.max_bad_share)
        self._files = BadSampleFiles(run_dir) if is_main else None
        self._log = BadSampleLog()

    def named(self, batches: Sequence[Batch]) -> list[SkippedSample]:
        """What this rank skipped to make the batches; each sample is named once in the log."""
        records = [record for batch in batches for record in batch.bad]
        for record in records:
            say_once(
                f"bad sample {record.key}", f"skipped sample {record.key}: {record.reason}; another takes its place"
            )
        return records

    def settle(self, records: list[SkippedSample], first_image: int, global_batch: int, loader: Loader) -> None:
        """Nothing; takes in what the ranks skipped in the step at `first_image`. Collective: all ranks.

        Raises: DataError on all ranks if too much of the run is bad.
        """
        everywhere = [record for own in collectives.gather_objects(records) for record in own]
        everywhere.sort(key=lambda record: (record.position, record.key))
        if self._files is not None:
            self._files.add(everywhere)
        self._log.add(everywhere)
        self.account.add(everywhere, self._epoch_samples)
        assert loader.horizon <= QUARANTINE_DELAY_BATCHES
        for number in self.account.beyond(loader.dataset.shard_sizes, self._budgets):
            begins = first_image + QUARANTINE_DELAY_BATCHES * global_batch
            self.account.quarantined[str(number)] = begins
            loader.quarantine(number, begins)
            get_logger().warning(
                f"{self._shards[number].shown}: {self.account.by_shard[str(number)][1]} of its samples are bad, more "
                f"than data.max_bad_share_of_shard={self._budgets.max_share_of_shard:g}; it is in quarantine from "
                f"image {begins} on"
            )
        self.account.check(first_image + global_batch, self._budgets, self._log)
