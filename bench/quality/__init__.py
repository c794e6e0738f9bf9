"""How true the pictures of a gang are to those of one device: `python -m bench.quality`."""
