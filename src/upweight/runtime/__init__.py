"""Where and when it runs: what is on disk, and whether it is still the same thing."""
