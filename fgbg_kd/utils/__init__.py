"""Exceptions, files, configs, checkpoints and imports of user code."""
