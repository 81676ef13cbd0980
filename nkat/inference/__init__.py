"""What `nkat_inference_engine.py` does: one model, one command. A top room: nothing else imports it."""
