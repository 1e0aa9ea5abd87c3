"""vLLM as an engine: a mixture per request inside its batches, or one mixture folded into its weights. Needs vLLM."""
