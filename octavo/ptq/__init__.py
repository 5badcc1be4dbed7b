"""Post-training quantization: a trained model in, the same model in 8 bits out."""
