"""Slow and obvious answers, computed another way than the package does, to compare it with."""
