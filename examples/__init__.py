"""Octavo at work on whole tasks, from data to table."""
