"""Fidelity of a gang's pictures to those of one device: `python -m bench.quality`."""
