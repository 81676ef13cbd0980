"""An Optuna study that survives; knows nothing of what is searched. Imports `nkat.host`."""
