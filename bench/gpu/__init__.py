"""What a machine with an NVIDIA GPU shows, stage by stage; `make gpu` runs all."""
