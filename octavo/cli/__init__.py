"""The command line: ``octavo quantize · evaluate · inspect · formats · doctor``."""
