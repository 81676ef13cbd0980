"""Θ learned from a text by gradient descent."""
