"""Packages that upweight does without until they are asked for."""

from upweight.errors import MissingPackage


def missing(what: str, package: str, extra: str, error: ImportError) -> MissingPackage:
    """The error where a package cannot be imported.

    Args:
        what: What it makes: "A table".
        package: Its name where it is installed from.
        extra: The extra of upweight that installs it.
        error: What Python said.
    """
    return MissingPackage(
        f"{what} is made by {package}.",
        f"{error}.",
        "an installation without it: upweight itself does not need it.",
        f"pip install {package}, or pip install 'upweight[{extra}]'.",
    )
