"""The UNet on images larger than it can take at once: in overlapping windows, blended at every step.

Spatial conditioning is concatenated to the UNet's input and cut with it, so every kind of it works; the context is
each window's, so a caption describes all windows alike. Windows of the training size keep what the UNet learned about
extents (attention's range, the norms' statistics, the noise level at which structure of that size appears); objects
larger than a window are beyond it.

Weights rise over the middle half of an overlap. Its outer quarters, where a window sees zeros in place of what lies
beyond its edge, weigh nothing: a network that sees no farther than that gives exactly what it gives on the whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ldm_scale.models.tiling import OVERLAP_SHARE, TilePlan

UNetCall = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # z with spatial conditioning, network time, context

_MARGIN_SHARE = 4  # of the overlap


class WindowedUNet:
    """A UNet that is asked about windows only, at most `max_windows` at a time; itself callable as one.

    Units: window and overlap in latents; an overlap of None is a quarter of the window. An image no larger than a
    window is one, so that the result is exactly the UNet's.
    """

    def __init__(self, unet: UNetCall, window: int, overlap: int | None = None, max_windows: int = 8) -> None:
        self.overlap = window // OVERLAP_SHARE if overlap is None else overlap
        assert 0 <= self.overlap < window, f"window {window}, overlap {overlap}"
        assert max_windows >= 1, f"max_windows {max_windows}"
        self.unet, self.window, self.max_windows = unet, window, max_windows

    def __call__(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        """The blended output, float32. Shapes: x (B, C, h, w), t (B,), context (B, M, d); returns (B, c, h, w)."""
        batch, _, height, width = x.shape
        plan = TilePlan(height, width, self.window, self.overlap, self.overlap // _MARGIN_SHARE)
        spans = [(image, row, column) for row, column in plan for image in range(batch)]
        row_weights = {row: plan.weights(plan.rows, row, 1).to(x.device) for row in plan.rows}
        column_weights = {column: plan.weights(plan.columns, column, 1).to(x.device) for column in plan.columns}
        out: Tensor | None = None
        for start in range(0, len(spans), self.max_windows):
            part = spans[start : start + self.max_windows]
            images = torch.tensor([image for image, _, _ in part], device=x.device)
            windows = torch.stack([x[i, :, r.start : r.stop, c.start : c.stop] for i, r, c in part])
            outputs = self.unet(windows, t[images], None if context is None else context[images]).float()
            if out is None:
                out = outputs.new_zeros(batch, outputs.shape[1], height, width)
            for (image, r, c), output in zip(part, outputs, strict=True):
                weight = row_weights[r][:, None] * column_weights[c]
                out[image, :, r.start : r.stop, c.start : c.stop].addcmul_(output, weight)
        assert out is not None, "an image has at least one window"
        return out
