"""How the built-in model is made: its pictures, its trainings, and the folder that they end in."""
