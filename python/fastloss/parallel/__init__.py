"""One loss over many ranks, each of which holds some of the classes."""

from .shard import VocabShard

__all__ = ["VocabShard"]
