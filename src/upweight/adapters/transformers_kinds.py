"""Which of the losses of transformers is a model's own? Told by the name of its class."""

from torch import nn

from upweight.task.task import bare, shifts_labels

NAMES = {
    "classifier": (
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForImageClassification",
        "ForAudioClassification",
        "ForVideoClassification",
        "ForMultipleChoice",
        "ForNextSentencePrediction",
    ),
    "masked_lm": ("ForMaskedLM",),
    "seq2seq": (
        "ForConditionalGeneration",
        "ForSeq2SeqLM",
        "EncoderDecoderModel",
        "MarianMTModel",
    ),
}
"""How the classes of models are called whose loss an adapter knows."""


def kind(model: nn.Module) -> str | None:
    """Which adapter a model belongs to, by the name of its class; None where that says nothing."""
    if shifts_labels(model):
        return "causal_lm"
    classes = [each.__name__ for each in type(bare(model)).__mro__]
    for name, endings in NAMES.items():
        if any(each.endswith(endings) for each in classes):
            return name
    return None


def per_token(model: nn.Module) -> bool:
    """Whether each token has its own class."""
    return any(each.__name__.endswith("ForTokenClassification") for each in type(model).__mro__)
