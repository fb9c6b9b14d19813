"""Comparisons of runs, their tables and pictures. The core never imports this package."""
