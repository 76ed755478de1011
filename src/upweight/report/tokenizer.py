"""Which words are the token numbers of a batch? Asked of the tokenizer that made them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from upweight.errors import SpecError
from upweight.task.arrays import TARGET_KEYS


@dataclass(frozen=True)
class Words:
    """One example, token by token, without its padding.

    Args:
        text: As the tokenizer writes it, without special tokens.
        pieces: A text of each token, with the space before it where there is one.
        special: Which of them are special tokens.
        positions: Their places in the batch.
        width: Places of a row of the batch, padding among them.
    """

    text: str
    pieces: tuple[str, ...]
    special: tuple[bool, ...]
    positions: tuple[int, ...]
    width: int


def require_tokenizer(given: Any) -> None:
    """Refuse, by a SpecError, what cannot turn numbers into words."""
    needed = ("convert_ids_to_tokens", "decode")
    if given is not None and not all(hasattr(given, name) for name in needed):
        raise SpecError(
            "tokenizer= takes a tokenizer of transformers.",
            f"a {type(given).__module__}.{type(given).__qualname__}.",
            "a function that makes tokens, or a tokenizer of another library.",
            "PreTrainedTokenizerFast(tokenizer_object=...); or train_texts= and query_texts=.",
        )


def words_in(batch: Any, tokenizer: Any) -> list[Words] | None:
    """The words of each example of a batch; None where it holds no token numbers."""
    ids = ids_in(batch)
    if ids is None:
        return None
    mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    if mask is None or mask.shape != ids.shape:
        pad, end = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "eos"))
        # A token that fills up and also ends texts says nothing of where they end.
        mask = ids != (-1 if pad is None or pad == end else pad)
    special = set(getattr(tokenizer, "all_special_ids", ()))
    found = []
    for row, kept in zip(ids.cpu(), mask.cpu(), strict=True):
        places = kept.nonzero().flatten().tolist()
        numbers = row[places].tolist()
        names = [str(name) for name in tokenizer.convert_ids_to_tokens(numbers)]
        is_special = tuple(number in special for number in numbers)
        pieces = _pieces(names, tokenizer)
        text = str(tokenizer.decode(numbers, skip_special_tokens=True)).strip()
        if "##" in text:  # a tokenizer that was saved without its decoder
            own = (p for p, hidden in zip(pieces, is_special, strict=True) if not hidden)
            text = "".join(own).strip()
        found.append(Words(text, pieces, is_special, tuple(places), ids.shape[1]))
    return found


def ids_in(batch: Any) -> Tensor | None:
    """Token numbers [b, t] of a batch; None: it has none."""
    first = None
    if isinstance(batch, dict):
        inputs = {name: value for name, value in batch.items() if name not in TARGET_KEYS}
        first = inputs.get("input_ids", next(iter(inputs.values()), None))
    elif isinstance(batch, tuple) and batch:
        first = batch[0]
    is_ids = isinstance(first, Tensor) and first.ndim == 2 and not first.is_floating_point()
    return first if is_ids else None


def _pieces(names: Sequence[str], tokenizer: Any) -> tuple[str, ...]:
    """What each token adds to the text, by the sign that its kind of tokenizer has for a space."""
    if any("Ġ" in name for name in names):  # bytes
        return tuple(str(tokenizer.convert_tokens_to_string([name])) for name in names)
    if any("▁" in name for name in names):  # sentencepiece
        return tuple(name.replace("▁", " ") for name in names)
    return tuple(name[2:] if name.startswith("##") else f" {name}" for name in names)
