"""The toolkit's version: written here, read by everything else."""

__version__ = "0.2.0.dev0"
