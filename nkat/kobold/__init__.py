"""What `backend_selector.py` does: KoboldCpp found, chosen, run. Imports `nkat.theta`, `nkat.gguf`, `nkat.host`."""
