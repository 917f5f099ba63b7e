"""The implementations that are compared: one function each, which sets up a call."""

from __future__ import annotations

import torch

from . import libraries, many, ours, ring
from .base import Peer, Ready

__all__ = ["Peer", "Ready", "all_peers"]


def all_peers(device: torch.device, compiled: bool = False) -> list[Peer]:
    """Every implementation, present or absent, ours first.

    Args:
        device: decides which of scaled_dot_product_attention's backends stand in the list.
        compiled: whether those under ``torch.compile`` are run; they are reported as absent if not.
    """
    return [
        *ours.peers(device),
        *libraries.peers(device),
        *ring.peers(device, compiled),
        *many.peers(device, compiled),
    ]
