"""Which training examples made the model do that, and what would change without them?

    S[q, i] = ∂m_q(θ(w)) / ∂wᵢ   at w = 1

Every score is a derivative with respect to a data weight: upweight example i, watch measurement q.

The public names are in `_public.py`, which the first use of one imports: `upweight --help` does
without PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # who checks types reads the names themselves
    from upweight._public import *  # noqa: F403
    from upweight._public import __all__ as __all__
else:

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return importlib.import_module("upweight.runtime.versions").library_versions()[
                "upweight"
            ]
        if name == "__all__" or not name.startswith("_"):
            public = importlib.import_module("upweight._public")
            globals().update({each: getattr(public, each) for each in ["__all__", *public.__all__]})
            if name in globals():  # a public name, or a folder of the package
                return globals()[name]
            for place in ("solvers", "labels", "training", "curvature"):
                if name in getattr(globals()[place], "__all__", ()):
                    raise AttributeError(f"{name} is upweight.{place}.{name}", name=name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return list(__getattr__("__all__"))
