"""What belongs to one network in one process."""

from __future__ import annotations

from typing import NoReturn


class Uncopied:
    """Part of a network that is in a gang: a copy of the network would answer calls by the same part."""

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Raise TypeError: `copy.deepcopy`, `pickle` and `torch.save` of a whole network end here."""
        raise TypeError(
            "what has joined a gang cannot be deep-copied or pickled; copy it before parallelize, or keep it "
            "by save_pretrained or state_dict()"
        )
