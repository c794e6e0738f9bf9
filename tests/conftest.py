"""What all tests share."""

from hypothesis import settings

# A claim is about values; how long an example takes depends on what else the machine does.
settings.register_profile("distriray", deadline=None)
settings.load_profile("distriray")
