"""What happens to a VQ codebook besides its gradient: usage figures, dead codes revived, codes as moving averages.

All of it works on the codes that the whole global batch chose, so that it is the same on any number of ranks and
micro-batches, and it draws no random number that is not a function of (seed, images).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ldm_scale.config.schema import AutoencoderLossConfig
from ldm_scale.engine import seeding
from ldm_scale.engine.checkpoint import Trained
from ldm_scale.engine.collectives import sum_over_ranks

CODEBOOK = "quantizer.codebook"
ALIVE_IMAGES = 10_000  # a code counts as alive if one of so many last images chose it
MIN_AVERAGE_COUNT = 1e-5  # below, an unused code's running sums would sink into denormal numbers and lose its place


class CodebookKeeper:
    """Follows the codes of each step and writes into the codebook where the configuration asks for it.

    Source: arXiv:1711.00937, appendix A.1 (codes as moving averages).
    """

    def __init__(self, trained: Trained, codebook: Tensor, loss: AutoencoderLossConfig, seed: int) -> None:
        self._trained, self._loss, self._seed = trained, loss, seed
        num_codes = trained.model.parameter_shapes[CODEBOOK][0]
        self.unused_images = torch.zeros(num_codes, device=codebook.device)
        trained.buffers["codebook/unused_images"] = self.unused_images
        self._averages = loss.codebook_update == "ema"
        if self._averages:
            # Every code starts as the average of one latent: itself.
            self._counts = torch.ones(num_codes, device=codebook.device)
            self._sums = codebook.detach().float().clone()
            trained.buffers |= {"codebook/counts": self._counts, "codebook/sums": self._sums}
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def observe(self, z_raw: Tensor, indices: Tensor, image_numbers: Tensor) -> None:
        """Nothing; notes a micro-batch. Shapes: (B, c, h, w), (B, h, w), (B,)."""
        vectors = z_raw.detach().float().permute(0, 2, 3, 1).flatten(1, 2)
        self._seen.append((vectors, indices.flatten(1), image_numbers))

    def discard(self) -> None:
        """Nothing; forgets the micro-batches of a step that is not made."""
        self._seen.clear()

    def update(self, images: int, global_batch: int) -> dict[str, float]:
        """Figures of the step that started after `images` images, once averages and dead codes are written.

        Collective: all ranks.
        """
        vectors, indices, numbers = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        self._seen.clear()
        flat = indices.flatten()
        counts = sum_over_ranks(torch.bincount(flat, minlength=len(self.unused_images)).float())
        self.unused_images.add_(global_batch).masked_fill_(counts > 0, 0.0)
        if self._averages:
            self._average(counts, vectors.flatten(0, 1), flat)
        window = self._loss.dead_code_images
        report = {"codebook/revived": float(self._revive(vectors, numbers, images, global_batch))} if window else {}
        share = counts / counts.sum()
        entropy = torch.special.entr(share).sum()
        return report | {
            "codebook/perplexity": float(entropy.exp()),
            "codebook/used_share": float((counts > 0).float().mean()),
            "codebook/alive_share": float((self.unused_images < ALIVE_IMAGES).float().mean()),
        }

    def _average(self, counts: Tensor, vectors: Tensor, indices: Tensor) -> None:
        """Every code becomes the moving average of the latents that chose it."""
        # The backward pass of a gather: the one sum over rows that is exact in its order on every device.
        sums = torch.ops.aten.embedding_dense_backward(vectors, indices, len(counts), -1, False)
        keep = self._loss.codebook_decay
        codes = self._sums / self._counts[:, None]
        self._counts.mul_(keep).add_(counts, alpha=1 - keep)
        self._sums.mul_(keep).add_(sum_over_ranks(sums), alpha=1 - keep)
        faded = self._counts < MIN_AVERAGE_COUNT
        self._counts.masked_fill_(faded, MIN_AVERAGE_COUNT)
        self._sums.copy_(torch.where(faded[:, None], codes * MIN_AVERAGE_COUNT, self._sums))
        rows = torch.arange(len(counts), device=counts.device)
        self._trained.write_rows(CODEBOOK, rows, self._sums / self._counts[:, None], restart=False)

    def _revive(self, vectors: Tensor, numbers: Tensor, images: int, global_batch: int) -> int:
        """Number of codes that were put on latents of this step, because none of `dead_code_images` chose them.

        No two on the same place: equal codes would tie for ever, and all but one would stay dead. A step has so many
        places; codes beyond them wait for the next.
        """
        places = vectors.shape[1]
        rows = torch.nonzero(self.unused_images >= self._loss.dead_code_images).flatten()[: global_batch * places]
        if not len(rows):
            return 0
        order = seeding.stream(self._seed, "revived codes", images).permutation(global_batch * places)[: len(rows)]
        chosen = torch.from_numpy(order).to(rows.device)
        # The rank that has the chosen image gives its latent, the others zeros.
        here = (chosen // places + images)[:, None] == numbers.to(rows.device)[None, :]
        latents = vectors[here.int().argmax(dim=1), chosen % places] * here.any(dim=1, keepdim=True)
        latents = sum_over_ranks(latents)
        self._trained.write_rows(CODEBOOK, rows, latents, restart=True)
        self.unused_images[rows] = 0.0
        if self._averages:
            self._counts[rows] = 1.0
            self._sums[rows] = latents
        return len(rows)
