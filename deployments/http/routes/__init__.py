"""What is answered at which URL: a router of each thing that can be asked about."""
