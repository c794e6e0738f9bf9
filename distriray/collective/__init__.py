"""Communication within a gang: point-to-point exchange by several backends."""

from distriray.collective.base import Communicator, Work
from distriray.collective.connect import connect
from distriray.collective.registry import BACKENDS, backend_of
from distriray.collective.store import ServedStore, open_store, serve_store

__all__ = [
    "BACKENDS",
    "Communicator",
    "ServedStore",
    "Work",
    "backend_of",
    "connect",
    "open_store",
    "serve_store",
]
