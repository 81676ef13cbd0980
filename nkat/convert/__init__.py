"""What `nkat_gguf_converter.py` does: Θ made, written, removed, merged. A top room: nothing else imports it."""
