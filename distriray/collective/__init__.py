"""How bytes move within a gang."""

from distriray.collective.base import Communicator, Work
from distriray.collective.rendezvous import connect
from distriray.collective.store import ServedStore, open_store, serve_store

__all__ = ["Communicator", "ServedStore", "Work", "connect", "open_store", "serve_store"]
