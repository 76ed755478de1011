"""Models of transformers and peft as upweight tasks: the loss that the model computes itself.

    causal_lm     ℓᵢ = −Σ_t log p(y_{t+1} | x_{≤t})           labels = input_ids
    masked_lm     ℓᵢ = −Σ_t log p(y_t | x)                    labels of what is masked
    seq2seq       ℓᵢ = −Σ_t log p(y_t | y_{<t}, x)            labels are what is written
    classifier    ℓᵢ = −log p(yᵢ | xᵢ)                        labels are classes
                  ℓᵢ = −(1/c) Σ_k log p(y_k | xᵢ)             labels are yes or no, c of them
                  ℓᵢ = (1/c) Σ_k (f_k − y_k)²                 labels are numbers

Sums are over the positions whose label is not −100. A model's own loss is a mean over the batch, so
ℓ of a batch adds up to `model(**batch).loss` times the number of labels that count.

The module does not import transformers: models are told by the names of their classes.
"""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from upweight._typing import Batch, Forward, Params
from upweight.adapters.transformers_data import (
    LABELS,
    Labelled,
    Padding,
    TextData,
    all_text,
    chat,
    lines_of,
    padded_on_the_left,
    read_back,
    text,
    token_data,
)
from upweight.adapters.transformers_kinds import kind, per_token
from upweight.adapters.transformers_trainer import FromTrainer, Recorder, parts_of
from upweight.errors import DataError, SpecError, UnsupportedModel
from upweight.task.data import PREDICTED, Data
from upweight.task.losses import Bernoulli, CrossEntropy, Loss, SquaredError
from upweight.task.modes import evaluated
from upweight.task.penalties import Penalty
from upweight.task.rows import class_names
from upweight.task.task import Reader as TaskReader
from upweight.task.task import Task, bare, call_model, next_token
from upweight.task.torch_losses import Rescaled, as_loss

__all__ = [
    "FromTrainer",
    "Padding",
    "Recorder",
    "TextData",
    "causal_lm",
    "chat",
    "classifier",
    "from_trainer",
    "kind",
    "lines_of",
    "masked_lm",
    "seq2seq",
    "task",
    "text",
    "with_loss",
]

COUPLES = (
    "SentenceTransformer",
    "SparseEncoder",
    "DPRQuestionEncoder",
    "DPRContextEncoder",
    "Wav2Vec2ForPreTraining",
)
"""Models that are trained to tell the examples of a batch from each other."""

MOVED = 1e-2
"""Relative change of outputs that is no rounding of half precision."""

PREDICTED_TOGETHER = 32
"""Texts of which the class is predicted at once."""

NO_CLASS = ("regression", "multi_label_classification")
"""Problems of a classifier in which an example has no single class."""

Adapter = Callable[..., Task]


def causal_lm(
    model: nn.Module,
    tokenizer: Any = None,
    penalty: Penalty | Callable[[Params], Tensor] | None = None,
    params: str | tuple[str, ...] = "*",
) -> Task:
    """The task of a model that predicts the next token: GPT-2, LLaMA and their kin, with LoRA too.

    ℓᵢ = −Σ_t log p(y_{t+1} | x_{≤t}), summed over the labels that are not −100. The labels lie at
    the places of their own tokens, as in transformers; data without labels get their tokens.

    Args:
        model: In eval mode. Frozen parameters are never part of θ: of a PEFT model the adapters
            are.
        tokenizer: For training data and queries that are texts or conversations.
        penalty: As for `Task`.
        params: As for `Task`.

    Raises:
        UnsupportedModel: It is another kind of model, or trained by a loss that couples examples.

    Example:
        >>> task = causal_lm(model, tokenizer)
        >>> fitted = uw.Influence(uw.EKFAC(), damping=uw.Relative(0.1)).fit(task, texts)
        >>> fitted.attribute(["The capital of France is Paris."])
    """
    _require_kind(model, "causal_lm")
    return _task(model, "causal_lm", tokenizer, penalty, params)


def masked_lm(
    model: nn.Module,
    tokenizer: Any = None,
    penalty: Penalty | Callable[[Params], Tensor] | None = None,
    params: str | tuple[str, ...] = "*",
) -> Task:
    """The task of a model that predicts the tokens that were masked: BERT and its kin.

    ℓᵢ = −Σ_t log p(y_t | x), summed over the labels that are not −100. An example keeps its masks:
    `text(..., masked=0.15)` draws them once.

    Arguments are those of `causal_lm`.

    Raises:
        UnsupportedModel: It is another kind of model, or trained by a loss that couples examples.
    """
    _require_kind(model, "masked_lm")
    return _task(model, "masked_lm", tokenizer, penalty, params)


def seq2seq(
    model: nn.Module,
    tokenizer: Any = None,
    penalty: Penalty | Callable[[Params], Tensor] | None = None,
    params: str | tuple[str, ...] = "*",
) -> Task:
    """The task of an encoder with a decoder: T5, BART and their kin.

    ℓᵢ = −Σ_t log p(y_t | y_{<t}, x), summed over the labels that are not −100. The decoder's inputs
    are the labels, moved by one by the model itself.

    Arguments are those of `causal_lm`.

    Raises:
        UnsupportedModel: It is another kind of model, or trained by a loss that couples examples.
    """
    _require_kind(model, "seq2seq")
    return _task(model, "seq2seq", tokenizer, penalty, params)


def classifier(
    model: nn.Module,
    tokenizer: Any = None,
    penalty: Penalty | Callable[[Params], Tensor] | None = None,
    params: str | tuple[str, ...] = "*",
) -> Task:
    """The task of a model that classifies texts, tokens, images or sounds, or predicts numbers.

    As `config.problem_type` says; where that is None, a model of one output predicts a number, and
    one of several a class.

        single_label_classification   ℓ = −log p(y | x), summed over tokens where they are labelled
        multi_label_classification    ℓ = −(1/c) Σ_k log p(y_k | x)
        regression                    ℓ = (1/c) Σ_k (f_k − y_k)²

    Arguments are those of `causal_lm`.

    Raises:
        UnsupportedModel: It is another kind of model, or trained by a loss that couples examples.
        SpecError: It reads its answer at the last token and has no padding token to find it.
    """
    _require_kind(model, "classifier")
    return _task(model, "classifier", tokenizer, penalty, params)


def task(
    model: nn.Module,
    tokenizer: Any = None,
    penalty: Penalty | Callable[[Params], Tensor] | None = None,
    params: str | tuple[str, ...] = "*",
    loss: Loss | Callable[[Tensor, Any], Tensor] | None = None,
) -> Task:
    """The task of a model whose class says which of the others it is.

    Args:
        model: As for `causal_lm`.
        tokenizer: As for `causal_lm`.
        penalty: As for `Task`.
        params: As for `Task`.
        loss: What the model was trained by in place of its own; see `with_loss`.

    Raises:
        UnsupportedModel: It does not say so, or its own loss couples examples and no other is
            given.
    """
    found = kind(model)
    if found is None:
        require_own_examples(model)
        raise UnsupportedModel(
            "The class of a model must say by which loss it was trained.",
            f"a {type(bare(model)).__name__}.",
            "a head of your own, or one of several outputs.",
            "say it: causal_lm(model), masked_lm(model), seq2seq(model) or classifier(model); of "
            "another loss uw.Task(model, loss, forward=lambda model, batch: (outputs, targets)).",
        )
    if loss is not None:  # nothing is asked of the model's own, such as that it has no other terms
        return with_loss(_task(model, found, tokenizer, penalty, params), loss)
    return ADAPTERS[found](model, tokenizer, penalty, params)


def with_loss(made: Task, loss: Loss | Callable[[Tensor, Any], Tensor]) -> Task:
    """The same task with the loss that the model was trained by in place of its own.

    Data are read as the adapter reads them: padded, with labels of their own and texts by the
    tokenizer; labels are moved by one where the model moves them. Examples that are tuples
    (inputs, targets) are taken as they are. Classes are on the model's own axis.

    Args:
        made: By `task` or one of the others.
        loss: As for `Task`.

    Raises:
        UnsupportedModel: Another adapter made the task.
        UpweightError: The loss is none, as for `Task`.
    """
    own = as_loss(loss)
    if not (made.reads is None or isinstance(made.reads, Reader)):
        raise UnsupportedModel(
            "with_loss takes a task of a model of transformers.",
            f"a task whose data are read by {type(made.reads).__qualname__}.",
            "the task of another adapter, whose loss belongs to how its data are read.",
            "uw.Task(made.model, loss, made.penalty, made.params, made.forward), with data as the "
            "model computes with them.",
        )
    if isinstance(own, CrossEntropy) and isinstance(made.loss, CrossEntropy):
        own = replace(own, axis=made.loss.axis)
    reads = replace(made.reads, has_own_loss=False) if isinstance(made.reads, Reader) else None
    return Task(made.model, own, made.penalty, made.params, ByForm(made.forward), reads)


def from_trainer(trainer: Any, init: Callable[[], nn.Module] | None = None) -> FromTrainer:
    """The task, the data, the history and the recipe of a `transformers.Trainer`.

    The loss is the model's own, with Trainer's label smoothing for classes. Weight decay is the
    optimizer's own, not the penalty `L2`. The recipe takes w = 0 for an example that is left out,
    and one other weight for those that stay: Trainer takes the mean over what is there.

    Args:
        trainer: After `train()`. A model in training mode is asked as it is in eval mode.
        init: Makes the untrained model, for the recipe. None: `model_init` of the Trainer, or the
            first state of its `Recorder`.

    Raises:
        DataError: There are no training data, they are streamed, or masks are drawn anew in each
            batch.
        SpecError: The loss is a function of the user's own.
        UpweightError: As for `task`.

    Example:
        >>> own = from_trainer(trainer)
        >>> fitted = uw.SOURCE().fit(own.task, own.data, history=own.history)
        >>> fitted.check(own.recipe, "10 min", queries=queries)
    """
    model, said = evaluated(trainer.model)  # `train()` leaves it in training mode
    made = task(model, getattr(trainer, "processing_class", None))
    found = parts_of(trainer, made, init)
    data = read_back(found.data, getattr(trainer, "processing_class", None))
    return replace(found, data=data, notes=(*said, *found.notes))


ADAPTERS: dict[str, Adapter] = {
    "causal_lm": causal_lm,
    "masked_lm": masked_lm,
    "seq2seq": seq2seq,
    "classifier": classifier,
}


def require_own_examples(model: nn.Module) -> None:
    """Refuse, by an UnsupportedModel, a loss of an example that depends on others of its batch."""
    inner = bare(model)
    name, arguments = type(inner).__name__, _arguments(inner) or ()
    config = getattr(inner, "config", None)
    if getattr(config, "output_router_logits", False):
        raise UnsupportedModel(
            "The loss of an example must not depend on the other examples of its batch.",
            f"{name} with config.output_router_logits=True, whose loss has a term that balances "
            "the experts over all tokens of a batch.",
            "training of a mixture of experts.",
            "model.config.output_router_logits = False attributes the loss of the labels; the "
            "balancing term is then no part of the objective.",
        )
    is_trained_so = name in COUPLES or "return_loss" in arguments
    is_headless = config is not None and name.endswith("Model") and "labels" not in arguments
    if not is_trained_so and (not is_headless or kind(model) is not None):
        return
    raise UnsupportedModel(
        "A task needs a loss of one example at a time: ℓᵢ that does not change with the others.",
        f"{name}, {'trained by contrast' if is_trained_so else 'which has no loss'}: it makes "
        "embeddings.",
        "an encoder of sentences or images that was trained to tell the pairs of a batch apart, so "
        "that every example is in the loss of every other.",
        "for which examples are embedded alike, uw.FeatureSimilarity(layer); for influence, make "
        "each pair an example with negatives of its own, uw.Task(model, loss, forward=lambda "
        "model, batch: (outputs, targets)), of which a number of all queries together may be asked "
        "by uw.Functional(...); or attribute a classifier on top of the embeddings.",
    )


def decoded(model: nn.Module, batch: Batch) -> tuple[Any, Any]:
    """Outputs and labels of an encoder with a decoder, which reads the labels before each."""
    inputs = {key: value for key, value in batch.items() if key not in LABELS}
    labels = batch[next(key for key in LABELS if key in batch)]
    shifted = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if "decoder_input_ids" in inputs or shifted is None:
        return model(**inputs, labels=labels).logits, labels
    return model(**inputs, decoder_input_ids=shifted(labels=labels)).logits, labels


def numbers(model: nn.Module, batch: Batch) -> tuple[Any, Any]:
    """As `call_model`, with targets in the shape and dtype of the outputs."""
    outputs, targets = call_model(model, batch)
    return outputs, targets.reshape(outputs.shape).to(outputs.dtype)


def _is_sequence(given: Any) -> bool:
    """Whether these are the tokens of one text."""
    if isinstance(given, list):
        return bool(given) and isinstance(given[0], int)
    return isinstance(given, Tensor | np.ndarray) and given.ndim == 1


def _as_examples(given: Any) -> Any:
    """One example, as a data set or `tokenizer(text)` returns it, as a list of one."""
    if isinstance(given, Mapping) and _is_sequence(given.get("input_ids")):
        return [dict(given)]
    if isinstance(given, Mapping) and isinstance(given.get("text"), str):
        return [dict(given)]
    # Words are a text, unless they name a file of texts.
    if isinstance(given, str) and len(given.split()) > 1 and not os.path.isfile(given):
        return [given]
    return [given] if isinstance(given, Tensor) and given.ndim == 1 else given


def _label_column(row: Any) -> str | None:
    """The entry of a row of a data set that is its label."""
    return next((k for k in LABELS if k in row), None) if isinstance(row, Mapping) else None


@dataclass(frozen=True)
class ByForm:
    """An adapter's way to call a model for batches with names; the usual way for tuples."""

    named: Forward

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Any, Any]:
        return (self.named if isinstance(batch, Mapping) else call_model)(model, batch)


@dataclass(frozen=True, eq=False)
class Reader(TaskReader):
    """How data become examples of a model of transformers: `Task.reads`.

    Args:
        model: Which takes them.
        kind: Which adapter it belongs to.
        tokenizer: For texts, if there is one.
        has_own_loss: Whether it was trained by its own loss.
    """

    model: nn.Module = field(repr=False)
    kind: str
    tokenizer: Any = field(repr=False, default=None)
    has_own_loss: bool = True

    fits_own_data = False

    @property
    def classes(self) -> tuple[Any, ...] | None:
        """The names of the classes; None where there are none but numbers."""
        if self.kind != "classifier":
            return None
        return class_names(bare(self.model))

    def training(self, given: Any) -> Data:
        """Training data: texts, tokens in any form, or what `as_data` takes.

        Raises:
            DataError: Of no example is anything predicted, as of texts of one token.
        """
        return self._read(given, "training examples")

    def queries(self, given: Any) -> Data:
        """Queries: as training data, or one of them.

        Of a classifier also texts or tokens alone: the class that it predicts stands for each.
        """
        given = _as_examples(given)
        if self.kind == "classifier":
            if isinstance(given, list) and all_text(given):
                return self._predicted(self._tokens(given))
            tokens = self._data(given)
            if isinstance(tokens, TextData) and len(tokens) and "labels" not in tokens.take([0]):
                return self._predicted(tokens)
        return self._read(given, "queries")

    def _predicted(self, inputs: TextData) -> Data:
        """Texts, each with the class that the model predicts."""
        found = []
        asked = Task(self.model, CrossEntropy(), forward=_logits)
        with torch.no_grad(), asked.in_step():
            for _, _, batch in inputs.batches(PREDICTED_TOGETHER):
                given = asked.to_device({k: v for k, v in batch.items() if k not in LABELS})
                found.append(asked.call(asked.held_theta(), given)[0])
        several = getattr(bare(self.model).config, "problem_type", None) in NO_CLASS
        if several or found[0].ndim != 2 or found[0].shape[1] < 2:
            raise self._no_labels()
        classes = torch.cat(found).argmax(dim=1).tolist()
        data = replace(inputs, dataset=Labelled(inputs.dataset, classes))
        return self._read(data, "queries").noted((PREDICTED,))

    def _tokens(self, texts: Any, column: str = "text", labels: str | None = None) -> TextData:
        most = getattr(getattr(bare(self.model), "config", None), "max_position_embeddings", None)
        self._require_tokenizer()
        return text(texts, self.tokenizer, column, min(512, most or 512), labels=labels)

    def _no_labels(self, given: str = "texts alone") -> DataError:
        hf = "import upweight.adapters.transformers as hf; hf.text(dataset, tokenizer, "
        ways = {
            "causal_lm": "give the tokens without that collate function: the labels are then the "
            "tokens; or DataCollatorForLanguageModeling(tokenizer, mlm=False).",
            "masked_lm": f"{hf}masked=0.15), which masks each text once.",
            "classifier": f"{hf}labels='label'), of rows with text and label: "
            "[{'text': text, 'label': 1}].",
            "seq2seq": f"{hf}labels='target').",
        }
        return DataError(
            f"The examples of {self.kind} are texts and their labels.",
            f"{given}.",
            "labels that are in another place, or that a collate function makes.",
            ways[self.kind],
        )

    def relabeled(self, example: Batch, label: Any) -> Batch:
        """A batch of one training example with another label: a class by its name or number."""
        names = self.classes
        if names is not None and label in names:
            label = names.index(label)
        old = example["labels"]
        new = torch.as_tensor(label, dtype=old.dtype, device=old.device).reshape(old.shape)
        return {**example, "labels": new}

    def _read(self, given: Any, role: str) -> Data:
        data = self._data(given)
        self._require_classes(data)
        self._require_labels(data)
        self._require_predicted(data, role)
        self._require_unmoved(data)
        return read_back(data, self.tokenizer)

    def _data(self, given: Any) -> Data:
        inner = bare(self.model)
        if self.kind == "causal_lm" and isinstance(given, list) and all(map(_is_sequence, given)):
            given = [{"input_ids": each} for each in given]
        tokens = (getattr(getattr(inner, "config", None), "pad_token_id", None),
                  getattr(self.tokenizer, "pad_token_id", None), 0)  # fmt: skip
        token = next(x for x in tokens if isinstance(x, int) and x >= 0)
        needs = self.kind == "causal_lm"
        return token_data(given, _arguments(inner), token, needs, self._encode)

    def _encode(self, given: Any, column: str) -> Data:
        self._require_tokenizer()
        if column == "messages":
            return chat(given, self.tokenizer)
        if self.kind == "causal_lm":
            return self._tokens(given)
        labels = None if isinstance(given, str | os.PathLike) else _label_column(given[0])
        if self.kind == "classifier" and labels is not None:
            return self._tokens(given, column, labels)
        raise self._no_labels()

    def _require_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise DataError(
                "Texts need the tokenizer that the model was trained with.",
                f"texts, for {self.kind}(model) without one.",
                "a tokenizer that was not passed.",
                "import upweight.adapters.transformers as hf, and pass "
                f"hf.{self.kind}(model, tokenizer) in place of the model; of a Trainer, "
                "processing_class=tokenizer. Or give tokens.",
            )

    def _require_classes(self, data: Data) -> None:
        """Refuse labels that `text` made of tokens: of the text itself, or of its class's name."""
        if self.kind != "classifier" or not isinstance(data, TextData) or not data.by_tokens:
            return
        if data.dataset.columns["labels"] is data.dataset.columns["input_ids"]:
            raise self._no_labels()
        raise DataError(
            "Labels of a classifier are class numbers.",
            "labels that are texts.",
            "classes by name.",
            "the place of each name in the model's order, row['label'] = names.index(row['label']);"
            " of a datasets.Dataset, dataset.class_encode_column('label') if that is the order of "
            "the names.",
        )

    def _require_labels(self, data: Data) -> None:
        """Refuse examples without labels, and a masked model's in which nothing is masked."""
        if not len(data):
            return
        first = data.take([0])
        if isinstance(first, dict) and "input_ids" in first and not set(LABELS) & set(first):
            raise self._no_labels(f"examples of {', '.join(sorted(first))}")
        if self.kind != "masked_lm":
            return
        for i in range(min(4, len(data))):
            batch = data.take([i])
            if not isinstance(batch, dict) or {"labels", "input_ids"} - set(batch):
                return
            kept = batch["labels"] != -100
            if not bool(kept.all()) or not torch.equal(batch["labels"], batch["input_ids"]):
                return
        raise DataError(
            "The labels of a masked language model are the tokens that its inputs lack.",
            "labels that are the inputs, at every place.",
            "a data set for a model that predicts the next token, or a collate function that masks "
            "at random, which was left out.",
            "import upweight.adapters.transformers as hf; hf.text(dataset, tokenizer, "
            "masked=0.15), which masks each example once.",
        )

    def _require_predicted(self, data: Data, role: str) -> None:
        """Refuse texts of which no token is predicted: their loss is 0 whatever the model.

        Read until the first of which one is; a note or a warning tells of the others.
        """
        if self.kind != "causal_lm":
            return
        for i in range(len(data)):
            batch = data.take([i])
            labels = batch.get("labels") if isinstance(batch, dict) else None
            if not isinstance(labels, Tensor) or bool((labels[:, 1:] != -100).any()):
                return
        if len(data):
            rows = getattr(data, "given", None)
            texts = list(getattr(rows, "texts", None) or ())[:3]
            raise DataError(
                "A language model predicts each token from those before it, so an example needs "
                "two tokens, of which the second counts.",
                f"{len(data)} {role} of which no token is predicted"
                f"{': ' if texts else ''}{', '.join(map(repr, texts))}.",
                "a text of one token, or labels that are −100 throughout.",
                "give a text with the word in it, such as a sentence that the model said.",
            )

    def _require_unmoved(self, data: Data) -> None:
        """Refuse padding on the left that changes what the model says."""
        at = None if self.kind == "seq2seq" else padded_on_the_left(data)
        if at is None:
            return
        batch = data.take([at])
        batch = batch if isinstance(batch, dict) else {}
        width = batch["attention_mask"].shape[1]
        count = int((batch["attention_mask"] != 0).long().argmax(dim=1)[0])
        inputs = {k: v.to(next(self.model.parameters()).device) for k, v in batch.items()
                  if k not in LABELS and isinstance(v, Tensor)}  # fmt: skip
        cut = {k: v[:, count:] if v.ndim > 1 and v.shape[1] == width else v
               for k, v in inputs.items()}  # fmt: skip
        if not count:
            return
        asked = Task(self.model, CrossEntropy(), forward=_logits)
        with torch.no_grad():
            long, short = (asked.call(asked.held_theta(), x)[0] for x in (inputs, cut))
        long = long if long.shape == short.shape else long[:, count:]
        moved = float((long - short).norm() / (short - short.mean()).norm())
        if not moved > MOVED:
            return
        raise DataError(
            "Padding must not change what the model says of an example.",
            f"{type(bare(self.model)).__name__}, whose outputs for example {at} move by "
            f"{moved:.0%} with {count} positions of padding on its left.",
            "tokenizer.padding_side = 'left' and a model that counts its positions from the first "
            "one, padding or not.",
            "give the examples without padding, or tokenizer.padding_side = 'right'; or say where "
            "each token is: position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0). Where the "
            "model was trained on such batches, uw.Task(model, uw.CrossEntropy()) takes them as "
            "they are.",
        )


def _logits(model: nn.Module, inputs: Batch) -> tuple[Any, Any]:
    outputs = model(**inputs)
    return getattr(outputs, "logits", outputs), None


def _classified(model: nn.Module) -> tuple[Loss, Forward]:
    """A classifier's own loss, and how it is called."""
    inner = bare(model)
    config = getattr(inner, "config", None)
    if hasattr(inner, "score") and getattr(config, "pad_token_id", 0) is None:
        raise SpecError(
            "A classifier that reads its answer at the last token must know what padding is.",
            f"{type(inner).__name__} with config.pad_token_id=None.",
            "a decoder's tokenizer, which has no padding token.",
            "model.config.pad_token_id = tokenizer.pad_token_id, as in training (a tokenizer "
            "without one: its eos_token_id).",
        )
    problem = getattr(config, "problem_type", None)
    is_number = problem == "regression" or (
        problem is None and getattr(config, "num_labels", 2) == 1 and not per_token(inner)
    )
    loss: Loss = CrossEntropy(axis=-1) if per_token(inner) else CrossEntropy()
    forward: Forward = call_model
    if is_number:
        loss, forward = Rescaled(SquaredError(), 2.0, mean=True), numbers
    elif problem == "multi_label_classification":
        loss, forward = Rescaled(Bernoulli(), 1.0, mean=True), numbers
    return loss, forward


OWN: dict[str, Callable[[nn.Module], tuple[Loss, Forward]]] = {
    "causal_lm": lambda model: (CrossEntropy(axis=-1), next_token),
    "masked_lm": lambda model: (CrossEntropy(axis=-1), call_model),
    "seq2seq": lambda model: (CrossEntropy(axis=-1), decoded),
    "classifier": _classified,
}
"""The loss of each kind, and how a model of it is called."""


def _task(
    model: nn.Module,
    name: str,
    tokenizer: Any,
    penalty: Penalty | Callable[[Params], Tensor] | None,
    params: str | tuple[str, ...],
) -> Task:
    _require_fixed(model)
    loss, forward = OWN[name](model)
    return Task(model, loss, penalty, params, forward, Reader(model, name, tokenizer))


def _require_kind(model: nn.Module, asked: str) -> None:
    """Refuse a model that is known to be of another kind."""
    if not isinstance(model, nn.Module):
        return  # Task says so
    require_own_examples(model)
    found = kind(model)
    if found not in (None, asked):
        raise UnsupportedModel(
            f"{asked} takes the models whose loss it is.",
            f"a {type(bare(model)).__name__}, whose own loss is that of {found}.",
            "an adapter for another kind of model.",
            f"{found}(model).",
        )


def _require_fixed(model: nn.Module) -> None:
    """Refuse a model that is about to divide its own parameters, as RWKV does when first asked."""
    every = getattr(getattr(bare(model), "config", None), "rescale_every", 0)
    waits = any(getattr(each, "layers_are_rescaled", True) is False for each in model.modules())
    if waits and every > 0:
        raise UnsupportedModel(
            "A model must not write to its parameters when it is asked.",
            f"{type(bare(model)).__name__} with config.rescale_every={every}, which "
            "divides some by powers of 2 when it is first asked in eval mode.",
            "a guard against overflow in half precision.",
            "model.config.rescale_every = 0, which computes the same with the parameters as "
            "trained.",
        )


def _arguments(model: nn.Module) -> Sequence[str] | None:
    """What a model takes by name; None where it takes anything."""
    signature = inspect.signature(model.forward).parameters
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, p in signature.items() if p.kind not in several] or None
