"""Types of the numbers that configurations, requests and results have, with their bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
ReservedCpus = Annotated[float, Field(ge=1e-4, allow_inf_nan=False)]  # Ray's smallest amount of anything
MOST_S = 1e9  # thirty years; timers of threads and event loops end at some hundred
Seconds = Annotated[NonNegative, Field(le=MOST_S)]
PositiveSeconds = Annotated[Positive, Field(le=MOST_S)]
