"""What it costs to convert a value in a step of its own: to another order of its axes, or to another number format.

Measured by `python -m benchmarks.conversions`: one core, each kind as a pass by itself over 12 thousand to 1.6 million
elements. `engine.conversions` says by them what a step costs. They are constants, so that engines of one kind of
machine say the same.

The time of a transpose follows the elements and hardly the bytes: 16 numbers of 4 bytes are turned in registers, 2
bytes and single ones are moved one by one. What is turned and changes its format in one pass takes as long as what it
reads alone would. What is fused (a cast into the kernel that makes or reads a value, a transpose that strides can say)
costs nothing here.
"""

from __future__ import annotations

STEP_PS = 300_000
"""One step more: its hand-over to the threads and the first misses in it."""

# Emerald-Rapids-class core, AVX-512; by size and shape 200 to 620 ps for 4 bytes, 890 to 1390 for 2, 770 to 1030 for 1;
# with a change of format 90 to 370 from 4 bytes to 2, 250 to 780 to 1, 840 to 1010 from 2 to 4, 740 to 970 from 1
_TRANSPOSE_PS = {1: 900, 2: 1100, 4: 500, 8: 1000}
_FORMAT_PS = 200  # 125 to 270, whatever the formats: f32 to bf16 and back, quantize, dequantize


def transpose_ps(n_elements: int, size_bytes: int) -> int:
    """A pass that changes the order of elements of so many bytes, and perhaps their format."""
    return STEP_PS + n_elements * _TRANSPOSE_PS.get(size_bytes, 100 * size_bytes)


def format_ps(n_elements: int) -> int:
    """A pass that changes the format of elements and not their order."""
    return STEP_PS + n_elements * _FORMAT_PS
