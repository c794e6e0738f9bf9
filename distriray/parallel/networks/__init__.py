"""Networks and how they are cut into patches; `families` has what tells one kind from another."""
