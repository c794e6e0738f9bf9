"""Quick starts for the processes that these tests launch."""

import multiprocessing

# The server that forks every rank imports the heavy packages once: fresh processes without seconds of import.
multiprocessing.set_forkserver_preload(["distriray.parallel", "diffusers.pipelines.stable_diffusion_xl"])
