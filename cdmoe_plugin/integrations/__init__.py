"""Entry points for lm-eval and vLLM."""
