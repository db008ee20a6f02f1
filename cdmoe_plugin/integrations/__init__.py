"""The entry points for lm-eval and vLLM."""
