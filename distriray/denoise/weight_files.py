"""Files of weights: what tells them apart, and what an error says of one."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest_of(path: Path) -> str:
    """Another for each content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def first_lines(error: Exception, most: int = 2) -> str:
    """The first lines of what an error says, empty ones aside, as one of 300 characters at most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:most])[:300] if lines else type(error).__name__
