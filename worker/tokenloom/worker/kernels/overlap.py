"""Kernels that start while the one before them in the stream still runs.

Hopper and later call it programmatic dependent launch. A kernel says early that the
next one may be placed beside it, and waits before it reads what another one wrote:

    A  ├ may follow ┤ weights, wait ├ computes, writes ┤
    B               ├ may follow ┤ weights ···· wait ···· ├ computes, writes ┤

What is launched this way keeps two rules, and may then stand beside any other kernel:

- Before the wait it reads nothing that a kernel launched this way writes, and writes nothing.
  What others wrote, torch's own among them, is whole once another of them came behind: where a
  step's spans lie, for one, since its embedding is looked up behind it. What the last of them
  wrote may still be on its way.
- Every program waits, even one with nothing to read: the wait is for the kernel before
  alone, so a kernel that ended without it would let the next one overtake both.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def real(device: torch.device) -> torch.device:
    """Returns what the meta device stands for: the present CUDA device, if there is one."""
    if device.type == "meta" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


@cache
def generation(device: torch.device) -> int:
    """Returns the first number of a GPU's compute capability, 9 of Hopper; 0: it is none."""
    device = real(device)
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def overlaps(device: torch.device) -> bool:
    """Returns whether kernels can be launched this way, `launch_pdl=True` to Triton."""
    return generation(device) >= 9


@triton.jit
def let_next_start(OVERLAPPED: tl.constexpr) -> None:
    """Lets the next kernel's programs be placed, as this one's leave room."""
    if OVERLAPPED:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAPPED: tl.constexpr) -> None:
    """Waits until the kernel before has ended, and what it wrote can be read."""
    if OVERLAPPED:
        gdc_wait()
