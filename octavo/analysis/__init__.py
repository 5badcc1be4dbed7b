"""What 8 bits cost: measures of a model's quality and of this machine's speed."""
