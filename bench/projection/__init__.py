"""Projection from one device to N."""
