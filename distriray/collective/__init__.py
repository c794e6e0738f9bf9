"""Communication within a gang: point-to-point exchange by several backends, and starting ranks."""

from distriray.collective.all_gather import all_gather
from distriray.collective.base import Communicator, Work
from distriray.collective.connect import connect
from distriray.collective.launch import launch
from distriray.collective.lockstep import LockstepCommunicator, run_in_lockstep
from distriray.collective.registry import BACKENDS, backends_of
from distriray.collective.store import ServedStore, open_store, serve_store

__all__ = [
    "BACKENDS",
    "Communicator",
    "LockstepCommunicator",
    "ServedStore",
    "Work",
    "all_gather",
    "backends_of",
    "connect",
    "launch",
    "open_store",
    "run_in_lockstep",
    "serve_store",
]
