"""Models, text and checkpoints: everything that is read from or written to files."""
