"""What N devices would do, from what one can tell."""
