"""Arithmetic of layers that a device may do in a way of its own, beside the way that every device can."""
