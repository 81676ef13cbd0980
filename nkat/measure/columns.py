"""The columns that tables of measured figures share."""

from __future__ import annotations

from functools import partial

from nkat.host.tables import Column
from nkat.measure.perplexity import change_text, perplexity_text

PERPLEXITY = Column("perplexity", ("perplexity", "perplexity_stderr"), perplexity_text)
PERPLEXITY_3 = Column("perplexity", ("perplexity", "perplexity_stderr"), partial(perplexity_text, digits=3))
CHANGE = Column("change", ("change_percent", "change_percent_stderr"), change_text)
CHANGE_PERCENT = Column("change %", CHANGE.keys, partial(change_text, unit=""))
KL = Column("KL divergence", ("kl_mean", "kl_stderr"), "{:.5f} ± {:.5f}".format)
SAME_TOP = Column("same top %", ("same_top_percent", "same_top_percent_stderr"), "{:.2f} ± {:.2f}".format)
TPE = Column("TPE", "tpe", ".6f")
