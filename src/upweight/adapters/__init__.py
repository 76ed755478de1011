"""Models of other libraries as upweight tasks: scikit-learn and statsmodels."""
