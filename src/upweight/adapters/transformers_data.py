"""Texts as examples: tokens of each, padded on the right to the longest of a batch.

    input_ids        the tokenizer's pad token
    labels           −100, which no loss counts
    attention_mask   0
    others           0

What a task of `upweight.adapters.transformers` is given becomes such data: a `datasets.Dataset` in
any format, the columns of a tokenizer, lists of texts, examples of different lengths.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from upweight.errors import DataError, message
from upweight.runtime.selection import spaced
from upweight.task.arrays import is_array
from upweight.task.collate import collate
from upweight.task.data import ArrayData, Data, IndexedData, as_data
from upweight.task.draws import Draws
from upweight.task.rows import Rows

IGNORED = -100
LOOKED_AT = 64
"""Examples of a data set in which padding is looked for."""

LABELS = ("labels", "label", "label_ids")
"""What data sets call their targets; models call them `labels`."""


@dataclass(frozen=True)
class Padding:
    """A batch of examples that are dicts of numbers and of sequences of them.

    Args:
        token: The token that fills up.

    Raises:
        DataError: An example has no token, or entries that are no sequences differ in shape.
    """

    token: int = 0

    def __call__(self, examples: list[Mapping[str, Any]]) -> Any:
        rows = [_row(example) for example in examples]
        if all("attention_mask" not in example for example in examples) and any(map(_packed, rows)):
            # With a mask, transformers would let the sequences of a row attend to each other.
            for row in rows:
                row.pop("attention_mask", None)
        for key in rows[0]:
            values = [row.get(key) for row in rows]
            if not all(isinstance(x, Tensor) and x.ndim == 1 for x in values):
                continue
            fills = {"labels": IGNORED, "input_ids": self.token, "decoder_input_ids": self.token}
            padded = pad_sequence(values, batch_first=True, padding_value=fills.get(key, 0))  # type: ignore[arg-type]
            for row, value in zip(rows, padded, strict=True):
                row[key] = value
        return collate(rows)


@dataclass(frozen=True)
class Collated:
    """Batches of a collate function of transformers, as a dict."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, examples: list[Any]) -> Any:
        batch = self.collate(examples)
        return dict(batch) if isinstance(batch, Mapping) else batch


def _row(example: Mapping[str, Any]) -> dict[str, Any]:
    row = {key: _numbers(value) for key, value in example.items()}
    ids = row.get("input_ids")
    if not isinstance(ids, Tensor):
        return row
    if not ids.numel():
        raise DataError(
            "An example must have at least one token.",
            "input_ids of length 0.",
            "an empty text, or one that a filter of characters has emptied.",
            "leave it out: dataset.filter(lambda row: len(row['input_ids'])).",
        )
    row.setdefault("attention_mask", torch.ones_like(ids))
    return dict(sorted(row.items()))  # whatever their order was, the same data are the same


def _packed(row: Mapping[str, Any]) -> bool:
    """Whether a row holds several sequences, each with positions from 0 on."""
    at = row.get("position_ids")
    return isinstance(at, Tensor) and at.ndim == 1 and bool((at[1:] < at[:-1]).any())


def _numbers(value: Any) -> Any:
    """A tensor of a number, or of a sequence of numbers."""
    if isinstance(value, Tensor):
        return value
    try:
        array = np.asarray(value)
    except ValueError:  # rows of several lengths
        return value
    if array.dtype.kind not in "biuf":
        return value
    # Token ids are kept in few bytes; embeddings take int64.
    return torch.as_tensor(array.astype(np.int64) if array.dtype.kind in "iu" else array.copy())


@dataclass(frozen=True, eq=False)
class Columns:
    """The entries that a model takes, of a data set whose examples are dicts.

    Args:
        dataset: Map-style.
        names: From the model's name of an entry to the data set's.
        next_token: Whether examples without labels get their own tokens.
    """

    dataset: Any
    names: Mapping[str, str]
    next_token: bool = False

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = self.dataset[int(i)]
        row = {name: item[key] for name, key in self.names.items()}
        if self.next_token:
            row["labels"] = own_labels(_numbers(row["input_ids"]), row.get("attention_mask"))
        return row


def own_labels(ids: Any, mask: Any) -> Tensor:
    """The tokens as labels, but those of padding, and the first after it: nothing predicts that."""
    ids = torch.as_tensor(ids)
    if mask is None:
        return ids
    padding = torch.as_tensor(mask) == 0
    after = torch.zeros_like(padding)
    after[..., 1:] = padding[..., :-1]
    return ids.masked_fill(padding | after, IGNORED)


@dataclass(frozen=True, eq=False)
class _Flat:
    """Sequences one after the other in one array."""

    values: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]]) -> "_Flat":
        values = np.fromiter((x for row in rows for x in row), dtype=np.int32)
        return cls(values, np.cumsum([len(row) for row in rows]))

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.ends[i - 1] if i else 0 : self.ends[i]]


@dataclass(frozen=True, eq=False)
class Tokenized:
    """Examples as a tokenizer has made them, in 4 bytes a token."""

    columns: Mapping[str, Any]
    n: int

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not -self.n <= i < self.n:
            raise IndexError(i)
        return {name: column[i % self.n] for name, column in self.columns.items()}


@dataclass(frozen=True, eq=False, repr=False)
class TextData(IndexedData):
    """Tokenized texts, padded to the longest of each batch. Made by `text` and `chat`."""

    collate: Callable[[list[Any]], Any] = field(default_factory=Padding)
    given: Rows | None = field(default=None, repr=False, kw_only=True)

    @property
    def by_tokens(self) -> bool:
        """Whether labels are tokens, of texts that `text` or `chat` has tokenized."""
        made = self.dataset
        return isinstance(made, Tokenized) and isinstance(made.columns.get("labels"), _Flat)


def text(
    dataset: Any,
    tokenizer: Any,
    column: str = "text",
    length: int = 512,
    *,
    labels: str | None = None,
    masked: float | None = None,
    seed: int = 0,
) -> TextData:
    """Texts as examples, one each, in their order.

    Without `labels` and `masked` each token is predicted from those before it: for `causal_lm`.

    Args:
        dataset: A `datasets.Dataset`, a list of texts or of dicts, or the path of a file with a
            JSON object or text a line.
        tokenizer: As the model was trained with. Its special tokens are those that it adds.
        column: The entry of a dict that is the text.
        length: Tokens per text at most; a text is cut there, and a note says how many were.
        labels: For `classifier`, the entry that is the class number (or numbers); for `seq2seq`,
            the text to be written.
        masked: For `masked_lm`, the share of tokens to be predicted: of these 80 % are replaced by
            the mask token and 10 % by any other (Devlin et al. 2019, §3.1). Which ones follows from
            the seed and the place of the example, and not from its batch.
        seed: Of what is masked.

    Raises:
        DataError: There is no such column, an entry is no text, or a text has no tokens.

    Cost: every text is tokenized once, now; 4 bytes a token are kept.
    """
    rows, texts = _entries(dataset, column)
    encoded = tokenizer(texts, truncation=True, max_length=length)
    ids = encoded["input_ids"]
    _require_tokens(ids, texts)
    columns: dict[str, Any] = {"input_ids": _Flat.of(ids)}
    if any(any(row) for row in encoded.get("token_type_ids", ())):
        columns["token_type_ids"] = _Flat.of(encoded["token_type_ids"])
    notes = _cut_notes(sum(len(row) >= length for row in ids), len(ids), length)
    if labels is not None:
        columns["labels"] = _labels(rows, labels, tokenizer, length)
    elif masked is not None:
        columns["input_ids"], columns["labels"] = _masked(ids, tokenizer, masked, seed)
    else:
        columns["labels"] = columns["input_ids"]
        silent = sum(len(row) < 2 for row in ids)
        if silent:
            notes += (f"{silent} of {len(ids)} texts have one token, which nothing predicts",)
    # A column of a `datasets.Dataset` is read from disk when it is asked for.
    said = rows[column] if isinstance(getattr(rows, "column_names", None), list) else texts
    held = Tokenized(columns, len(ids))
    return TextData(held, Padding(_pad(tokenizer)), notes, given=Rows(texts=said))


def chat(dataset: Any, tokenizer: Any, column: str = "messages", length: int = 2048) -> TextData:
    """Conversations as examples: the loss is that of the assistant's answers alone.

    Which tokens are an answer is said by the chat template where it marks them ({% generation %});
    else an answer is what the template writes after its generation prompt.

    Args:
        dataset: As for `text`; the column holds lists of {"role": …, "content": …}.
        tokenizer: With a chat template, as the model was trained with.
        column: The entry of a dict that is the conversation.
        length: Tokens per conversation at most.

    Raises:
        DataError: There is no template, a conversation has no answer, or answers cannot be told
            from the rest.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "Conversations become text by the tokenizer's chat template.",
            f"a {type(tokenizer).__name__} without one.",
            "the tokenizer of a base model, that was not trained on conversations.",
            "tokenizer.chat_template = ..., as in training; for plain texts, text(...).",
        )
    _, conversations = _entries(dataset, column, list)
    pairs = [_answered(tokenizer, each, i) for i, each in enumerate(conversations)]
    ids = [tokens[:length] for tokens, _ in pairs]
    kept = [
        [t if a else IGNORED for t, a in zip(tokens, answer, strict=True)][:length]
        for tokens, answer in pairs
    ]
    notes = _cut_notes(sum(len(tokens) > length for tokens, _ in pairs), len(pairs), length)
    silent = sum(all(x == IGNORED for x in row) for row in kept)
    if silent:
        notes += (f"{silent} of {len(kept)} conversations were cut before any answer",)
    columns = {"input_ids": _Flat.of(ids), "labels": _Flat.of(kept)}
    said = ["\n".join(f"{m.get('role')}: {m.get('content')}" for m in x) for x in conversations]
    held = Tokenized(columns, len(ids))
    return TextData(held, Padding(_pad(tokenizer)), notes, given=Rows(texts=said))


@dataclass(frozen=True, eq=False)
class Labelled:
    """Examples that are dicts, each with a label of its own."""

    rows: Any
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**self.rows[i], "labels": self.labels[i]}


@dataclass(frozen=True, eq=False)
class _Decoded(Sequence[str]):
    """The text of each example, read back from its tokens when it is asked for."""

    data: Data
    tokenizer: Any

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        numbers = self.data.take([i])["input_ids"][0].tolist()
        return str(self.tokenizer.decode(numbers, skip_special_tokens=True))


def read_back(data: Data, tokenizer: Any) -> Data:
    """Examples of tokens, called by what a tokenizer reads in them; others as they are."""
    if data.given is not None or not isinstance(data, IndexedData) or not len(data):
        return data
    first = data.take([0])
    if not hasattr(tokenizer, "decode") or not isinstance(first, dict) or "input_ids" not in first:
        return data
    found = copy.copy(data)
    object.__setattr__(found, "given", Rows(texts=_Decoded(data, tokenizer)))
    return found


def token_data(
    given: Any,
    taken: Sequence[str] | None,
    token: int,
    next_token: bool,
    encode: Callable[[Any, str], Data],
) -> Data:
    """Data from whatever holds tokens or texts.

    Args:
        given: `Data`, a `DataLoader`, a dict of columns, a data set of dicts, or texts.
        taken: What the model takes by name; None: anything.
        token: The token that fills up.
        next_token: Whether labels that are not there are the tokens themselves.
        encode: From texts and their column, "text" or "messages", to data.

    Raises:
        DataError: There are no tokens and no texts.
    """
    if isinstance(given, TextData):
        return replace(given, collate=Padding(token))
    if isinstance(given, Data) and not isinstance(given, IndexedData):
        return given
    if isinstance(given, str | Path) or (isinstance(given, list) and all_text(given)):
        return encode(given, "text")
    if _is_conversation(given):
        raise DataError(
            "Conversations must be given as a list of them.",
            f"{len(given)} messages, with the roles {[each['role'] for each in given]}.",
            "one conversation in place of a list of them.",
            "[messages].",
        )
    if isinstance(given, list) and given and all(map(_is_conversation, given)):
        return encode(given, "messages")
    if isinstance(given, Mapping):
        return _of_columns(given, taken, token, next_token)
    if isinstance(given, tuple) or is_array(given):
        return as_data(given)
    found = given if isinstance(given, IndexedData) else as_data(given)
    if not isinstance(found, IndexedData) or found.collate is not collate or not len(found):
        return found  # the user's own collate function
    first = found.dataset[0]
    if not isinstance(first, Mapping):
        return found
    if "input_ids" not in first and any(_is_text(x) for x in first.values()):
        column = next((c for c in ("text", "messages") if c in first), None)
        if column is None:
            raise DataError(
                "The texts of a data set must be tokenized.",
                f"the columns {sorted(first)}.",
                "texts under another name than text or messages.",
                "say which column it is: text(dataset, tokenizer, column=...).",
            )
        return encode(found.dataset, column)
    names = _names(first, taken)
    rows = Columns(found.dataset, names, next_token and _lacks_labels(names))
    return TextData(rows, Padding(token), found.notes)


def _of_columns(
    given: Mapping[str, Any], taken: Sequence[str] | None, token: int, next_token: bool
) -> Data:
    """What a tokenizer returns, or a dict of arrays."""
    arrays = dict(given)
    ids = arrays.get("input_ids")
    if isinstance(ids, list):
        if ids and isinstance(ids[0], int):
            raise DataError(
                "Tokens must be given as one sequence for each example.",
                f"input_ids of {len(ids)} numbers.",
                "tokenizer(text) of one text, which has no axis for examples.",
                "tokenizer([text]).",
            )
        names = _names({k: v[0] for k, v in arrays.items() if len(v)}, taken)
        columns = {name: arrays[key] for name, key in names.items()}
        rows = Tokenized(columns, len(ids))
        same = {name: name for name in names}
        return TextData(Columns(rows, same, next_token and _lacks_labels(names)), Padding(token))
    if next_token and ids is not None and not any(key in arrays for key in LABELS):
        arrays["labels"] = own_labels(ids, arrays.get("attention_mask"))
    names = _names(arrays, taken)
    return as_data({name: arrays[key] for name, key in sorted(names.items())})


def _names(first: Mapping[str, Any], taken: Sequence[str] | None) -> dict[str, str]:
    """The entries of an example that the model takes, as numbers, by its names for them."""
    target = next((key for key in LABELS if key in first), None)
    names = {
        key: key
        for key, value in first.items()
        if key not in LABELS
        and (taken is None or key in taken)
        and not (_is_text(value) or value is None)
    }
    return names if target is None else {**names, "labels": target}


def _lacks_labels(names: Mapping[str, str]) -> bool:
    return "labels" not in names and "input_ids" in names


def _is_text(value: Any) -> bool:
    if isinstance(value, str | bytes | dict):
        return True
    return isinstance(value, list) and bool(value) and isinstance(value[0], str | dict)


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, Mapping) and {"role", "content"} <= set(each) for each in value)
    )


def all_text(rows: Sequence[Any]) -> bool:
    """Whether they are texts, and there are some."""
    return bool(rows) and all(isinstance(row, str) for row in rows)


# -- from texts to tokens --------------------------------------------------------------------------


def _entries(
    dataset: Any, column: str, kind: type = str, argument: str = "column"
) -> tuple[Any, list[Any]]:
    """The rows of a data set, and the entry of each that `argument` asked for."""
    rows = lines_of(Path(dataset)) if isinstance(dataset, str | Path) else dataset
    if not hasattr(rows, "__len__") or not len(rows):
        raise DataError(
            "Texts must be given as a data set, a list, or the path of a file of lines.",
            f"a {type(dataset).__name__}{' without a row' if hasattr(rows, '__len__') else ''}.",
            "a stream, or an empty file or split.",
            "list(stream), or load_dataset(..., split='train').",
        )
    first = rows[0]
    if not isinstance(first, Mapping):
        found = list(rows)
    elif column not in first:
        others: Iterator[Any] = (k for k, v in first.items() if isinstance(v, kind))
        if argument == "labels":  # any kind of object: a number before a text
            others = iter(sorted(first, key=lambda k: isinstance(first[k], str | list)))
        raise DataError(
            f"The column of the {'texts' if argument == 'column' else argument} must be one of "
            "the data set.",
            f"{argument}={column!r} of {sorted(map(str, first))}.",
            "another name for it.",
            f"{argument}={next(others, '...')!r}.",
        )
    else:
        # A column of a `datasets.Dataset` is read at once.
        whole = isinstance(getattr(rows, "column_names", None), list)
        at_once: Any = rows
        found = list(at_once[column]) if whole else [row[column] for row in rows]
    wrong = next((i for i, x in enumerate(found) if not isinstance(x, kind)), None)
    if wrong is not None:
        raise DataError(
            f"Each entry of the column must be a {'text' if kind is str else 'list of messages'}.",
            f"a {type(found[wrong]).__name__} in row {wrong}.",
            "a missing value, or another column.",
            "leave such rows out, or name the column: column=...",
        )
    return rows, found


def lines_of(path: Path) -> list[Any]:
    """The objects of a file with one a line.

    Raises:
        DataError: There is no such file, or a line is no JSON.
    """
    if not path.is_file():
        raise DataError(
            "Texts may be given as the path of a file with a JSON object or text a line.",
            f"{str(path)[:80]!r}, where there is none.",
            "another current folder, or one text in place of a list of them.",
            "a list of texts, [text].",
        )
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise DataError(
                    "Each line of the file must be a JSON object or text.",
                    f"line {number} of {path.name}: {error}.",
                    "a file of plain text, or one JSON array over several lines.",
                    "open(path).read().splitlines() is a list of texts; json.load one of objects.",
                ) from error
    return rows


def _require_tokens(ids: Sequence[Sequence[int]], texts: Sequence[str]) -> None:
    empty = next((i for i, row in enumerate(ids) if not len(row)), None)
    if empty is not None:
        raise DataError(
            "Each text must have at least one token.",
            f"{texts[empty]!r} in row {empty}, which has none.",
            "an empty line or a missing value.",
            "leave such rows out: [t for t in texts if t.strip()].",
        )


def _labels(rows: Any, name: str, tokenizer: Any, length: int) -> Any:
    """Class numbers, or the tokens of texts to be written."""
    _, values = _entries(rows, name, object, "labels")
    missing = next((i for i, value in enumerate(values) if value is None), None)
    if missing is not None:
        raise DataError(
            "Each text must have its label.",
            f"None in row {missing} of {name!r}.",
            "rows that nobody has labelled.",
            f"leave such rows out: [row for row in rows if row[{name!r}] is not None].",
        )
    if isinstance(values[0], str):
        found = tokenizer(text_target=values, truncation=True, max_length=length)["input_ids"]
        _require_tokens(found, values)
        return _Flat.of(found)
    return np.asarray(values)


def _masked(
    ids: Sequence[Sequence[int]], tokenizer: Any, share: float, seed: int
) -> tuple[_Flat, _Flat]:
    """Tokens of which some are masked, and what these were."""
    mask = getattr(tokenizer, "mask_token_id", None)
    if mask is None or not 0 < share <= 1:
        raise DataError(
            "A share of the tokens is replaced by the tokenizer's mask token.",
            f"masked={share!r} and a {type(tokenizer).__name__} with mask_token_id={mask}.",
            "the tokenizer of a model that predicts the next token; or a percentage.",
            "masked=0.15; leave it out for causal_lm.",
        )
    size, inputs, labels = len(tokenizer), [], []
    for i, row in enumerate(ids):
        tokens = torch.tensor(row)
        u = Draws.of(seed, 0, torch.tensor([i])).uniform((len(row), 3))[0]
        special = torch.tensor(
            tokenizer.get_special_tokens_mask(list(row), already_has_special_tokens=True)
        ).bool()
        order = u[:, 0].masked_fill(special, 2)
        # At least one, or the text would have no loss.
        chosen = (order < share) | ((order == order.min()) & ~special)
        other = torch.where(u[:, 1] < 0.8, mask, (u[:, 2] * size).long())
        changed = torch.where(chosen & (u[:, 1] < 0.9), other, tokens)
        inputs.append(changed.tolist())
        labels.append(torch.where(chosen, tokens, IGNORED).tolist())
    return _Flat.of(inputs), _Flat.of(labels)


def _answered(tokenizer: Any, messages: list[Any], i: int) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and which of them are the assistant's."""
    if not any(message.get("role") == "assistant" for message in messages):
        raise DataError(
            "A conversation must have an answer of the assistant, whose loss it is.",
            f"the roles {[message.get('role') for message in messages]} in row {i}.",
            "a prompt without its answer, or another name for the role"
            + (" (from and value, as of ShareGPT)." if "from" in messages[0] else "."),
            "leave it out, or call the role assistant: {'role': 'assistant', 'content': text}.",
        )
    if re.search(r"{%-?\s*generation\b", str(tokenizer.chat_template)):
        made = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(made["input_ids"]), [bool(x) for x in made["assistant_masks"]]

    def written(count: int, prompt: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=prompt
            )
        )

    whole = written(len(messages), False)
    spans = []
    for k, each in enumerate(messages):
        if each.get("role") == "assistant":
            before, after = written(k, True), written(k + 1, False)
            if not whole.startswith(before) or not whole.startswith(after):
                raise DataError(_no_spans(i, k))
            spans.append((len(before), len(after)))
    made = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    answer = [
        any(start < stop and start < b and stop > a for a, b in spans)
        for start, stop in made["offset_mapping"]
    ]
    return list(made["input_ids"]), answer


def _no_spans(i: int, k: int) -> str:
    return message(
        "What the chat template writes of a message must not depend on those after it.",
        f"message {k} of row {i}, which is written otherwise when the conversation goes on.",
        "a template that leaves out earlier reasoning, or moves the system message.",
        "mark the answers in the template, {% generation %}{{ message['content'] }}"
        "{% endgeneration %}, or make an example of each answer with the messages before it.",
    )


def _cut_notes(count: int, n: int, length: int) -> tuple[str, ...]:
    if not count:
        return ()
    return (f"{count} of {n} texts reach {length} tokens, where they are cut",)


def _pad(tokenizer: Any) -> int:
    token = getattr(tokenizer, "pad_token_id", None)
    return 0 if token is None else int(token)


def padded_on_the_left(data: Data) -> int | None:
    """The first example whose mask begins with zeros: of all arrays, or of some; None: none."""
    n = len(data)
    if isinstance(data, ArrayData):
        arrays = data.arrays
        mask = arrays.get("attention_mask") if isinstance(arrays, dict) else None
        at: Sequence[int] = range(n)
    else:
        at = spaced(n, LOOKED_AT)
        batch = data.take(at) if at and data.form.uncut is None else None
        mask = batch.get("attention_mask") if isinstance(batch, dict) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2 or not mask.shape[1]:
        return None
    found = (mask != 0).long().argmax(dim=1).nonzero().flatten().tolist()
    return at[found[0]] if found else None
