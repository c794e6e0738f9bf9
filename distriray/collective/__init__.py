"""How bytes move within a gang."""

from distriray.collective.base import Communicator, Work

__all__ = ["Communicator", "Work"]
