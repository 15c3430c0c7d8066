"""EDM2's networks as a list of operations, from their paper's description: channels, blocks, resolutions.

They are not ours. Operations are laid out from the paper's equations and then scaled to the multiply-adds and
parameters that it prints, so that what counts here are those and the passes over memory between the products.

Source: Karras et al., arXiv:2312.02696, section 2 (config G), Table 6, and appendix B: four resolutions from 64x64 with
1, 2, 3, 4 times the base channels, three blocks each on the way down and four up, self-attention at 16x16 and 8x8,
magnitude-preserving SiLU, sums and normalisation, weights that are normalised in every forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ldm_scale.planning.trace import Amount, Gradient, Kind, Operation, Trace

SIDES, MULTIPLIERS, BLOCKS, ATTENTION_SIDES = (64, 32, 16, 8), (1, 2, 3, 4), 3, (16, 8)
HALF, SINGLE = 2, 4  # bytes
# Passes over a block's features besides its convolutions, reading and writing each: normalisation 3, SiLU 2, embedding
# 2, SiLU 2, sum 3, clipping 2.
PASSES = (3, 2, 2, 2, 3, 2)
# Of the fp32 weights: read, norm, scaled, cast forward; the gradient through the same backward. Bytes a parameter.
WEIGHT_BYTES = {"forward": 4 + 4 + 4 + 4 + 2, "backward": 2 + 4 + 4 + 4 + 4 + 4}


@dataclass
class _Layers:
    forward: list[Operation] = field(default_factory=list)
    backward: list[list[Operation]] = field(default_factory=list)  # by block, to be turned round
    elements: list[int] = field(default_factory=list)

    def block(self, into: int, out: int, side: int, attends: bool) -> None:
        """Two 3x3 convolutions, a 1x1 one where the channels change, and attention."""
        pixels = side * side
        products: list[tuple[Kind, int, int, int]] = [("convolution", 9, into, out), ("convolution", 9, out, out)]
        if into != out:
            products.append(("convolution", 1, into, out))
        if attends:
            products += [("convolution", 1, out, 3 * out), ("convolution", 1, out, out)]
        elements = sum(taps * a * b for _, taps, a, b in products)
        there, back = self.forward, []
        for kind, taps, a, b in products:
            flops = Amount(0, 2.0 * taps * a * b * pixels)
            moved = Amount(HALF * taps * a * b, HALF * (a + b) * pixels)
            there.append(Operation(kind, "forward", flops, moved))
            back += [Operation(kind, "backward", flops, moved)] * 2
        if attends:
            flops, moved = 4.0 * pixels**2 * out, Amount(0, HALF * 4 * out * pixels)
            there.append(Operation("attention", "forward", Amount(0, flops), moved))
            back.append(Operation("attention", "backward", Amount(0, 2.5 * flops), moved))
        for passes in PASSES:
            moved = Amount(0, HALF * passes * out * pixels)
            there.append(Operation("other", "forward", Amount(0, 0), moved))
            back += [Operation("other", "backward", Amount(0, 0), moved)] * 2
        there.append(Operation("other", "forward", Amount(0, 0), Amount(WEIGHT_BYTES["forward"] * elements, 0)))
        back.append(Operation("other", "backward", Amount(0, 0), Amount(WEIGHT_BYTES["backward"] * elements, 0)))
        self.backward.append(back)
        self.elements.append(elements)

    def counts(self) -> tuple[float, int]:
        """Multiply-adds per image, and parameters, as laid out here."""
        return sum(op.flops.per_image for op in self.forward) / 2, sum(self.elements)


def edm2_trace(base_channels: int, parameters: float, multiply_adds: float) -> Trace:
    """The step of an EDM2 network with so many parameters, and multiply-adds per image and forward pass."""
    layers = lay_out(base_channels)
    own_multiply_adds, own_parameters = layers.counts()
    return _scaled(layers, multiply_adds / own_multiply_adds, parameters / own_parameters)


def lay_out(base_channels: int) -> _Layers:
    """The blocks of an EDM2 network in order."""
    layers = _Layers()
    widths = [base_channels * m for m in MULTIPLIERS]
    channels, skips = widths[0], [widths[0]]
    for level, (width, side) in enumerate(zip(widths, SIDES, strict=True)):
        for index in range(BLOCKS + (level > 0)):
            downsamples = level > 0 and index == 0  # a block without a change of channels
            out = channels if downsamples else width
            layers.block(channels, out, side, side in ATTENTION_SIDES and not downsamples)
            channels = out
            skips.append(channels)
    for level in reversed(range(len(widths))):
        width, side = widths[level], SIDES[level]
        first = level == len(widths) - 1
        for index in range(2 if first else 1):  # two in the middle, of which one attends; elsewhere one that upsamples
            layers.block(channels, channels, side, first and index == 0)
        for _ in range(BLOCKS + 1):
            layers.block(channels + skips.pop(), width, side, side in ATTENTION_SIDES)
            channels = width
    return layers


def _scaled(layers: _Layers, by_flops: float, by_parameters: float) -> Trace:
    def scaled(op: Operation) -> Operation:
        flops = Amount(0, op.flops.per_image * by_flops)
        return Operation(op.kind, op.phase, flops, Amount(op.bytes.fixed * by_parameters, op.bytes.per_image))

    events: list[Operation | Gradient] = [scaled(op) for op in layers.forward]
    for operations, elements in zip(reversed(layers.backward), reversed(layers.elements), strict=True):
        events += [scaled(op) for op in operations]
        events.append(Gradient(round(elements * by_parameters)))
    return Trace(tuple(events))
