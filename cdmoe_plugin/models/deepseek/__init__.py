"""DeepSeekMoE (`model_type` "deepseek"): `modeling_deepseek`, imported only when needed."""
