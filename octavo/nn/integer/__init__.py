"""Networks that run on integers alone, from their quantized input to their quantized output."""
