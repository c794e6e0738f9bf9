"""How bytes move within a gang."""

from distriray.collective.base import Communicator, Work
from distriray.collective.rendezvous import connect

__all__ = ["Communicator", "Work", "connect"]
