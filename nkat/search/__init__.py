"""What `nkat_auto_optimizer.py` does for language models. A top room: nothing else imports it."""
