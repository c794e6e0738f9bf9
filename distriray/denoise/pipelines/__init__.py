"""Pipelines, driven step by step; `families` has how each kind is."""
