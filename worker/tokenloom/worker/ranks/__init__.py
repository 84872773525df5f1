"""What the ranks of a group tell and add in a step, and how they meet."""

from tokenloom.worker.ranks.base import ALONE, Alone, Ranks

__all__ = ["ALONE", "Alone", "Ranks"]
