"""Health: whether a request could be served, as it was found a moment ago."""

from __future__ import annotations

import asyncio
import time

from distriray.errors import DistrirayError
from distriray.service import Service

FRESH_S = 1.0  # anybody may ask, without a key, and each look costs a ping of every worker


class Health:
    """The health of a service, looked at once a second at most, however many ask."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._looking = asyncio.Lock()
        self._looked_s = float("-inf")
        self._illness: DistrirayError | None = None

    async def check(self) -> None:
        """Return if a request that came now could be served; raises the DistrirayError that says why not."""
        async with self._looking:  # whoever waited for a look takes what it found
            if time.monotonic() - self._looked_s >= FRESH_S:
                self._illness = await self._look()
                self._looked_s = time.monotonic()
        if self._illness is not None:
            raise self._illness

    async def _look(self) -> DistrirayError | None:
        try:
            await self._service.check_health()
        except DistrirayError as error:
            return error
        return None
