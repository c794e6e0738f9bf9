"""Network families: what tells one kind of network from another, one file a family."""
