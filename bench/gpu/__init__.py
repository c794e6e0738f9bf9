"""Measurements on a machine with an NVIDIA GPU, stage by stage; `make gpu` runs all."""
