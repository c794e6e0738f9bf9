"""Lines that deployments write to Serve's log."""

from __future__ import annotations

import logging

from distriray.errors import DistrirayError


def shorten_refusals() -> None:
    """Let Serve's log have one line, not a traceback, for a request that was refused on purpose."""
    log = logging.getLogger("ray.serve")
    if not any(isinstance(known, _OneLine) for known in log.filters):
        log.addFilter(_OneLine())


def leave_out_calls() -> None:
    """Let Serve's log have no line for each call to this process: routers ask several times a second.

    A `logging_config` of the deployment's own, which can say so, would go before that of the whole service.
    """
    log = logging.getLogger("ray.serve")
    if not any(isinstance(known, _NoCalls) for known in log.filters):
        log.addFilter(_NoCalls())


class _NoCalls(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not getattr(record, "serve_access_log", False)


class _OneLine(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, DistrirayError):
            record.msg, record.args, record.exc_info = f"{type(error).__name__}: {error}", (), None
        return True
