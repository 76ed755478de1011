"""A folder of a model of transformers → its task, offline and without running code of the folder.

What `model.save_pretrained(folder)` and `tokenizer.save_pretrained(folder)` write: a config.json,
weights in safetensors and a tokenizer. Of a LoRA adapter of peft, saved the same way, the adapters
are θ.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from upweight._typing import Folder
from upweight.adapters.transformers import task as task_of
from upweight.errors import UnsupportedModel, UpweightError
from upweight.runtime.packages import missing
from upweight.task.task import Task

CONFIG, ADAPTER = "config.json", "adapter_config.json"


def from_folder(
    folder: Folder, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Task, Any]:
    """The task of a saved model, and its tokenizer.

    Nothing is downloaded, no pickle is read, and no Python file of the folder is run. Weights in
    half precision become `dtype`, without loss.

    Args:
        folder: Where it is.
        dtype: Of its parameters.
        device: Where it works.

    Raises:
        UnsupportedModel: There is no such model, it is of no class that transformers has, or its
            class does not say by which loss it was trained.
        MissingPackage: transformers is not installed.
    """
    place = Path(folder)
    try:
        with _quietly():
            model, tokenizer = _model(place, dtype), _tokenizer(place)
    except UpweightError:
        raise
    except ImportError as error:
        raise missing("A model in a folder", "transformers", "transformers", error) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedModel(
            "A model is read from its folder alone: config.json, *.safetensors and a tokenizer.",
            f"{place}: {first}",
            "weights as a pickle (pytorch_model.bin), a model with code of its own, a folder "
            "without its tokenizer, or a name on the hub in place of a folder.",
            "model.save_pretrained(folder); tokenizer.save_pretrained(folder), and name that "
            "folder; or write a project.py with your own task.",
        ) from error
    return task_of(model.to(device).eval(), tokenizer), tokenizer


def _model(place: Path, dtype: torch.dtype) -> nn.Module:
    import transformers

    given: dict[str, Any] = {
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
    }
    if (place / ADAPTER).is_file():
        import peft

        return peft.AutoPeftModelForCausalLM.from_pretrained(
            str(place), is_trainable=True, dtype=dtype, **given
        )
    if not (place / CONFIG).is_file():
        raise UnsupportedModel(
            f"The folder of a model holds its {CONFIG}.",
            f"{place}, which {'has none' if place.exists() else 'does not exist'}.",
            "another current folder, a checkpoint's parent, or a name on the hub.",
            "name the folder that model.save_pretrained(folder) wrote.",
        )
    names = json.loads((place / CONFIG).read_text(encoding="utf-8")).get("architectures") or [""]
    kind = getattr(transformers, str(names[0]), None)
    if kind is None or not hasattr(kind, "from_pretrained"):
        raise UnsupportedModel(
            "The class of a saved model must be one of transformers.",
            f"architectures={names} in {place / CONFIG}.",
            "a model with code of its own, which is not run.",
            "load it in a project.py of yours, as `task`.",
        )
    return kind.from_pretrained(str(place), dtype=dtype, **given)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the progress bars of transformers, which are drawn into files of output as well."""
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _tokenizer(place: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(place), local_files_only=True, trust_remote_code=False)
