"""The command line: ``octavo quantize · evaluate · inspect · formats · doctor``, one small file a command.

A command's file has ``add``, which declares its arguments, and ``run``, which does the work and imports what it needs
when it is called: ``octavo --help`` loads neither torch nor transformers.
"""
