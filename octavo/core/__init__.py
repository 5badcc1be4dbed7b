"""Pure meaning: what an 8-bit number is, how many share a scale, how a tensor becomes 8 bits. No modules, no files."""
