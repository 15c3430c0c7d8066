"""How fast a run trains and when it will be done.

Validation, pictures and checkpoints are pauses: counting them would make the figure jump at every one of them and say
nothing about the training step. tqdm's own rate cannot leave them out, hence ours; tqdm only draws the bar. Where
stderr is a file (a Slurm log, CI) a bar's carriage returns make one endless line, so there a plain line is written
every ten seconds instead.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Self

from tqdm import tqdm

WINDOW_S = 30.0
PLAIN_INTERVAL_S = 10.0


class Throughput:
    """Images per second over the last `window_s` seconds of training.

    `clock` returns seconds that only grow; tests hand in their own.
    """

    def __init__(self, window_s: float = WINDOW_S, clock: Callable[[], float] = time.perf_counter) -> None:
        self._window_s, self._clock = window_s, clock
        self._start_s = clock()
        self._paused_s = 0.0
        self._images = 0
        self._marks: deque[tuple[float, int]] = deque([(0.0, 0)])  # (active_s, images) at the end of each step

    @property
    def active_s(self) -> float:
        """Seconds since construction, without pauses."""
        return self._clock() - self._start_s - self._paused_s

    @property
    def images_per_s(self) -> float | None:
        """Rate over the window; None before the first step has ended."""
        (first_s, first_images), (last_s, last_images) = self._marks[0], self._marks[-1]
        return (last_images - first_images) / (last_s - first_s) if last_s > first_s else None

    def update(self, num_images: int) -> None:
        """Notes that a step over `num_images` images has just ended."""
        now_s = self.active_s
        self._images += num_images
        self._marks.append((now_s, self._images))
        # Two marks stay, however long one step takes.
        while len(self._marks) > 2 and now_s - self._marks[1][0] >= self._window_s:
            self._marks.popleft()

    def time_left_s(self, num_images: int) -> float | None:
        """Seconds that `num_images` more images take at the present rate; None while the rate is unknown."""
        rate = self.images_per_s
        return None if rate is None else num_images / rate

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside this context out of the account."""
        begin_s = self._clock()
        try:
            yield
        finally:
            self._paused_s += self._clock() - begin_s


class TrainProgress:
    """The training loop's progress on stderr: images seen, images/s, time left and the latest losses.

    Only the rank with `enabled` shows anything; the account of time is kept on all of them.
    """

    def __init__(
        self,
        total_images: int,
        initial: int = 0,
        enabled: bool = True,
        description: str = "train",
        throughput: Throughput | None = None,
    ) -> None:
        self.throughput = throughput or Throughput()
        self._total_images, self._seen, self._description = total_images, initial, description
        self._postfix = ""
        self._last_plain_s = self.throughput.active_s
        self._plain = enabled and not sys.stderr.isatty()
        self._bar = tqdm(
            total=total_images,
            initial=initial,
            desc=description,
            unit="img",
            mininterval=1.0,
            dynamic_ncols=True,
            file=sys.stderr,
            disable=not enabled or self._plain,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}{postfix}",
        )

    def update(self, num_images: int, losses: Mapping[str, float] | None = None) -> None:
        """Notes that a step over `num_images` images has just ended; `losses` stay on display until given anew."""
        self.throughput.update(num_images)
        self._seen += num_images
        if losses is not None:
            self._postfix = "".join(f", {name} {value:.4g}" for name, value in losses.items())
        self._bar.set_postfix_str(self._rate() + self._postfix, refresh=False)
        self._bar.update(num_images)
        if self._plain and self.throughput.active_s - self._last_plain_s >= PLAIN_INTERVAL_S:
            self._write_plain()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside this context (validation, pictures, a checkpoint) out of the rate."""
        with self.throughput.paused():
            yield

    def close(self) -> None:
        """Leaves the last state on display."""
        if self._plain:
            self._write_plain()
            self._plain = False
        self._bar.close()

    def _rate(self) -> str:
        rate = self.throughput.images_per_s
        left_s = self.throughput.time_left_s(max(0, self._total_images - self._seen))
        if rate is None or left_s is None:
            return "starting"
        digits = 1 if rate < 100 else 0
        return f"{rate:.{digits}f} img/s, {tqdm.format_interval(int(left_s))} left"

    def _write_plain(self) -> None:
        self._last_plain_s = self.throughput.active_s
        share = self._seen / max(1, self._total_images)
        sys.stderr.write(
            f"{self._description} {share:4.0%} {self._seen}/{self._total_images} img, {self._rate()}{self._postfix}\n"
        )
        sys.stderr.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
