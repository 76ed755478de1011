"""Models of other libraries as upweight tasks: scikit-learn, statsmodels and transformers."""
