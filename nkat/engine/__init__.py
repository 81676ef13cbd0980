"""One sequence, token by token: decoders and sampling. Imports `nkat.lm` and what lies below."""
