"""The server: an OpenAI-compatible API on one model, whose Θ each request chooses."""
