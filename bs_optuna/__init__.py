"""Tune batch size and learning rate together, in whatever memory there is."""
