"""A quantised model's stored scales, learned anew: a better file of the same size."""
