"""What `torchrun` starts in the tests: exchanges over its agent's store and over a store of our own."""

import os
import sys

import torch

from distriray.collective import connect

rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
places = {
    f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}": "the agent's address",
    sys.argv[1]: "an address of its own",
}
for address, place in places.items():
    communicator = connect("gloo", rank=rank, world_size=world_size, address=address, timeout_s=20)
    heard = torch.zeros(1, dtype=torch.int64)
    communicator.exchange({1 - rank: torch.tensor([rank])}, {1 - rank: heard}).wait()
    communicator.close()
    sys.stdout.write(f"rank {rank} heard {heard.item()} at {place}\n")
