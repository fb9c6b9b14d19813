"""Embedded data sets, made from files that ship inside published packages."""
