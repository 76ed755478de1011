"""Packages that upweight does without until they are asked for."""

from upweight.errors import MissingPackage


def missing(what: str, package: str, extra: str, error: ImportError) -> MissingPackage:
    """The error where `what`, such as "A table", needs a package that cannot be imported."""
    return MissingPackage(
        f"{what} is made by {package}.",
        f"{error}.",
        "an installation without it: upweight itself does not need it.",
        f"pip install {package}, or pip install 'upweight[{extra}]'.",
    )
