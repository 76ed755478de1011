"""Every approximation has a model on which it is exact: here it is held to it."""
