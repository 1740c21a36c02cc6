"""The blend of slow and fast weights.

    slow <- slow + pace (fast - slow),   fast <- slow

pace 1 keeps the fast weights; this is the outer step of Lookahead (Zhang et al., 2019, arXiv:1907.08610).
"""

from __future__ import annotations

from torch import Tensor


def follow(slow: Tensor, fast: Tensor, pace: float) -> None:
    """Move `slow` towards `fast` by `pace` of the way and put `fast` there, both in place and of one shape."""
    fast.copy_(slow.lerp_(fast, pace))
