"""What `lm_eval --model nkat` runs: EleutherAI's lm-evaluation-harness on the toolkit's engine."""
