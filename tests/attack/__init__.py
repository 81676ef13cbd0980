"""Hostile model files by the thousand: what becomes of each, in processes whose end is seen. See `tests.attack.run`."""
