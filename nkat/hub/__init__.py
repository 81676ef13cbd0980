"""Models by name: `hf:owner/repo[:quant]` in place of a file. Nothing is fetched but where a user writes one."""
