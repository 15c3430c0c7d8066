"""A network, its AdamW and DeepSpeed's ZeRO behind one small interface (its keys: engine/deepspeed_settings.py).

What the rest of the project needs from ZeRO is where each parameter's fp32 master values and Adam moments lie on this
rank. `ShardedModel.fragments` answers that in one form for every stage: a list of (parameter, offset, flat tensor)
pieces. Checkpoints, EMA and the swap of weights for evaluation are built on the fragments and know nothing of stages.

    stage 0    every rank holds all masters; a parameter is one fragment
    stage 1, 2 a rank holds one slice of the concatenation of all parameters; a parameter may straddle two ranks
    stage 3    a rank holds one slice of every parameter

The master tensors are reached through attributes that DeepSpeed does not promise (hence its exact pin, and
tests/distributed/test_zero.py, which compares every stage with plain torch).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ldm_scale import faults
from ldm_scale.config.schema import OptimizerConfig, ZeroConfig
from ldm_scale.engine import phases
from ldm_scale.engine.deepspeed_settings import deepspeed_settings
from ldm_scale.engine.env import Environment
from ldm_scale.engine.gradients import GradientNorm, forget_gradient, gradient_norm, handed_back
from ldm_scale.engine.imports import import_uncompiled
from ldm_scale.errors import NumericsError

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """One parameter's fp32 masters on this rank: elements offset to offset + length of the flattened parameter."""

    name: str
    shape: tuple[int, ...]
    offset: int
    owner: Tensor  # the tensor that the optimizer steps; its state is found by it
    start: int  # of this fragment in the flattened owner
    length: int

    @property
    def master(self) -> Tensor:
        """View of the master values, (length,)."""
        return self.slice_of(self.owner.detach())

    def slice_of(self, x: Tensor) -> Tensor:
        """View of this fragment's part of a tensor that is laid out like the owner, (length,)."""
        return x.view(-1)[self.start : self.start + self.length]

    def elements_of_rows(self, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Where the elements of those rows lie in this fragment, and their new values, (m,) each.

        Shapes: rows (n,) int64, values (n, D) of a parameter (K, D).
        """
        width = self.shape[1]
        places = (rows[:, None] * width + torch.arange(width, device=rows.device)).flatten() - self.offset
        mine = (places >= 0) & (places < self.length)
        return places[mine], values.flatten()[mine].float()


class ShardedModel:
    """A network that trains under ZeRO.

    Collective: all ranks construct it, call it, and call `backward` and `step`.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        optimizer: OptimizerConfig,
        zero: ZeroConfig,
        stage: int,
        micro_batch: int,
        accumulation_steps: int,
        environment: Environment,
        gathered_whole: Sequence[type[nn.Module]] = (),
    ) -> None:
        """`gathered_whole`: kinds of modules whose weights stage 3 gathers at once, around their forward."""
        self.stage = stage
        self.environment = environment
        self.module = module.to(environment.device)
        self._names = {parameter: name for name, parameter in module.named_parameters()}
        self.parameter_shapes = {name: tuple(parameter.shape) for parameter, name in self._names.items()}
        self.engine = _initialize(
            self.module, optimizer, zero, stage, micro_batch, accumulation_steps, environment, gathered_whole
        )
        self._adam: torch.optim.Optimizer = self.engine.basic_optimizer
        self.fragments = list(self._locate_fragments())
        self._create_moments()
        self._holds_gradient = False
        self._norm: GradientNorm | None = None  # of the gradient that is held, once it was asked for

    def __call__(self, *args: Any) -> Any:
        """The network's output, through ZeRO's hooks; floating inputs in the compute type, but float64 as it is."""
        return self.engine(*tree_map(self._cast, args))

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of one micro-batch's mean loss; averages over ranks when the batch is complete."""
        phases.enter("backward")
        self._holds_gradient = True
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # only counts the micro-batch, by which DeepSpeed finds the boundary

    def gradient_square(self) -> Tensor | None:
        """A scalar whose mean over the ranks is the squared norm of the gradient that `step` would apply; else None.

        Not finite on a rank: neither is the mean. Read once, for `step` as well. Collective: all ranks.
        """
        if not self._holds_gradient:
            return None
        self._norm = gradient_norm(self.engine, self.stage)
        return self._norm.value.double().square().cpu() * (1 if self._norm.is_of_all else self.environment.world_size)

    def discard(self) -> None:
        """Forgets the accumulated gradient; weights and Adam's state stay, bit for bit. Collective: all ranks."""
        if self._holds_gradient:
            forget_gradient(self.engine, self._adam)
        self._holds_gradient, self._norm = False, None

    def step(self, lr: float) -> float:
        """Applies the accumulated gradient and returns its norm before clipping.

        Raises: NumericsError if the norm is not finite; the weights are then unchanged.
        """
        for group in self._adam.param_groups:
            group["lr"] = lr
        known, self._holds_gradient, self._norm = self._norm, False, None
        if self.stage == 0:
            # DeepSpeed clips stage 0 without returning the norm, and steps on non-finite gradients.
            known = known or gradient_norm(self.engine, 0)
            norm = float(known.value)
        if self.stage > 0 or math.isfinite(norm):
            with handed_back(self.engine, self.stage, known):
                self.engine.step()
        if self.stage > 0:
            norm = float(self.engine.get_global_grad_norm() or 0.0)
        if not math.isfinite(norm):
            raise NumericsError(
                f"the gradient's norm is {norm}; the step was not applied. Continue from the last checkpoint with a "
                "smaller optimizer.lr, or train.precision=fp32"
            )
        faults.poison("weights", self.kept_weight(next(iter(self._names))))
        return norm

    def kept_weight(self, parameter: Tensor) -> Tensor:
        """What this rank keeps of a parameter that computes between steps: all of it, or at stage 3 its own part."""
        return parameter.ds_tensor if self.stage == 3 else parameter  # type: ignore[attr-defined]

    def moments(self, fragment: Fragment) -> dict[str, Tensor]:
        """Views of the fragment's Adam moments, (length,) each."""
        state = self._adam.state[fragment.owner]
        return {key: fragment.slice_of(state[key]) for key in MOMENTS}

    @property
    def optimizer_steps(self) -> int:
        """Steps that Adam's bias correction counts."""
        return int(self._adam.state[self._owners()[0]]["step"].item())

    def set_optimizer_steps(self, steps: int) -> None:
        """Sets Adam's step count, after a checkpoint's moments have been copied in."""
        for owner in self._owners():
            self._adam.state[owner]["step"].fill_(float(steps))

    def publish_masters(self) -> None:
        """Makes the weights that compute equal to the masters. Collective: all ranks, after masters were written."""
        optimizer = self.engine.optimizer
        if self.stage in (1, 2):
            optimizer.update_lp_params()
        elif self.stage == 3:
            for group in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            if optimizer.persistent_parameters:
                optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters, has_been_updated=False)
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        elif self.environment.dtype != torch.float32:
            for parameter, master in zip(self._half_parameters(), self._owners(), strict=True):
                parameter.data.copy_(master.data)

    def publish_rows(self, name: str, rows: Tensor, values: Tensor) -> None:
        """Makes those rows of a weight that computes equal to `values`, which its masters hold. Collective: all ranks.

        Below stage 3 every rank has the whole weight, and all have the same values: nothing needs to be sent.
        """
        if self.stage == 3:
            self.publish_masters()
            return
        (parameter,) = (parameter for parameter, known in self._names.items() if known == name)
        with torch.no_grad():
            parameter[rows] = values.to(parameter.dtype)

    @contextmanager
    def masters_replaced_by(self, replacement: list[Tensor]) -> Iterator[None]:
        """Computes with other weights (such as the EMA's) inside the block, then with the trained ones again.

        Shapes: replacement holds one tensor per fragment, in their order. Collective: all ranks.
        """
        kept = [fragment.master.clone() for fragment in self.fragments]
        self._write_masters(replacement)
        try:
            yield
        finally:
            self._write_masters(kept)

    def _write_masters(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for fragment, value in zip(self.fragments, values, strict=True):
                fragment.master.copy_(value)
        self.publish_masters()

    def _cast(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64:
            return value.to(self.environment.dtype)
        return value

    def _owners(self) -> list[Tensor]:
        """The tensors that Adam steps on this rank."""
        optimizer = self.engine.optimizer
        if self.stage == 0:
            if self.environment.dtype == torch.float32:
                return list(self._names)
            return [master for group in optimizer.fp32_groups for master in group]
        if self.stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        if hasattr(optimizer, "single_partition_of_fp32_groups"):
            return list(optimizer.single_partition_of_fp32_groups)
        return list(optimizer.fp32_groups_flat_partition)  # DeepSpeed's own class for bf16 at stage 1

    def _half_parameters(self) -> list[nn.Parameter]:
        """The parameters that compute, in the order of `_owners` (stage 0)."""
        if self.environment.dtype == torch.float32:
            return list(self._names)
        return [parameter for group in self.engine.optimizer.fp16_groups for parameter in group]

    def _locate_fragments(self) -> Iterator[Fragment]:
        owners = self._owners()
        if self.stage == 0:
            for parameter, owner in zip(self._half_parameters(), owners, strict=True):
                name = self._names[parameter]
                yield Fragment(name, self.parameter_shapes[name], 0, owner, 0, owner.numel())
            return
        for parameter, name in self._names.items():
            if self.stage == 3:
                fragment = self._stage3_fragment(parameter, name, owners)
            else:
                fragment = self._stage12_fragment(parameter, name, owners)
            if fragment is not None:
                yield fragment

    def _stage12_fragment(self, parameter: Any, name: str, owners: list[Tensor]) -> Fragment | None:
        mapping = parameter._hp_mapping
        if mapping is None:  # this rank's slice does not touch the parameter
            return None
        return Fragment(
            name,
            self.parameter_shapes[name],
            mapping.lp_fragment_address.start,
            owners[mapping.param_group_index],
            mapping.hp_fragment_address.start,
            mapping.hp_fragment_address.numel,
        )

    def _stage3_fragment(self, parameter: Any, name: str, owners: list[Tensor]) -> Fragment | None:
        optimizer = self.engine.optimizer
        group, start, partition = optimizer.grad_position[optimizer.get_param_id(parameter)]
        offset = self.environment.rank * partition
        length = min(partition, parameter.ds_numel - offset)  # the last ranks' partitions are padded
        if length <= 0:
            return None
        return Fragment(name, self.parameter_shapes[name], offset, owners[group], start, length)

    def _create_moments(self) -> None:
        """Creates Adam's state before the first step, so that a checkpoint's values have a place to go."""
        for owner in self._owners():
            self._adam.state[owner] = {
                "step": torch.zeros((), dtype=torch.float32, device=owner.device),
                **{key: torch.zeros_like(owner, requires_grad=False) for key in MOMENTS},
            }


def _initialize(
    module: nn.Module,
    optimizer: OptimizerConfig,
    zero: ZeroConfig,
    stage: int,
    micro_batch: int,
    accumulation_steps: int,
    environment: Environment,
    gathered_whole: Sequence[type[nn.Module]],
) -> Any:
    deepspeed = import_deepspeed(environment)
    adam = torch.optim.AdamW(
        module.parameters(),
        lr=0.0,  # `step` sets it; DeepSpeed's bf16 stage 0 makes a step at once, whose weight decay must not count
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        fused=True,
    )
    on_cuda = environment.device.type == "cuda"
    settings = deepspeed_settings(
        optimizer, zero, stage, micro_batch, accumulation_steps, environment.dtype == torch.bfloat16, on_cuda
    )
    if stage == 3 and gathered_whole:
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(module, list(gathered_whole))
    engine, *_ = deepspeed.initialize(model=module, optimizer=adam, config=settings)
    return engine


def import_deepspeed(environment: Environment) -> Any:
    """The deepspeed module, imported on first use, told the accelerator, kept from printing and from compiling.

    On CPU it would compile an op of shared memory (a minute, and it goes around the network); gloo gives the same.
    """
    device = environment.device
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
    os.environ.setdefault("LOCAL_RANK", str(environment.launch.local_rank))  # DeepSpeed insists on the variable
    # DeepSpeed's stage 3 calls what torch deprecates, at every bucket of every step.
    warnings.filterwarnings(
        "ignore", message=".*(reduce_scatter_tensor|all_gather_into_tensor)", category=FutureWarning
    )
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    if device.type == "cpu":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    import_uncompiled("deepspeed.runtime.zero.muon.original_muon")  # ZeRO's optimizers ask whether they are given it
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", verbose=False)
    return deepspeed
