"""Training of the built-in model: its pictures, its trainings, and the folder that they end in."""
