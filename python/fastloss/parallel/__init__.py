"""One loss over many ranks, each of which holds some of the classes."""

from .dtensor import takes_dtensors
from .shard import VocabShard

__all__ = ["VocabShard", "takes_dtensors"]
