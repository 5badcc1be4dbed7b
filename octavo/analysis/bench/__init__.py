"""How fast 8-bit layers and models are here: beside floats, beside other libraries, beside what the machine can do."""
