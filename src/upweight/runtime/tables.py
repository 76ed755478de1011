"""pandas, which only tables need: `from upweight.runtime.tables import pd` where one is made."""

from upweight.runtime.packages import missing

try:
    import pandas as pd
except ImportError as error:
    raise missing("A table", "pandas", "pandas", error) from error

__all__ = ["pd"]
