"""The steps of a Lightning Trainer, recorded. Where lightning is absent, nothing here runs."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import upweight as uw
from tests.training.loops import data, net, replayed, task
from upweight.errors import SpecError

if find_spec("lightning") is None:
    pytest.skip("lightning is not installed", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")


def fitted(folder, workers=0, epochs=2, ckpt=None, every=2, **options):
    import lightning.pytorch as pl

    from upweight.adapters.lightning import Recorder

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, k):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.5)

    model, recorder = Net(), Recorder(folder / "run", every, module="net")
    torch.manual_seed(3)
    loader = DataLoader(TensorDataset(*data()), 4, shuffle=True, num_workers=workers)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[recorder],
        use_distributed_sampler=False, **options,
    )  # fmt: skip
    assert isinstance(recorder, pl.Callback)
    trainer.fit(model, loader, ckpt_path=ckpt)
    assert type(loader.sampler) is type(loader.batch_sampler.sampler)
    return model.net.eval(), recorder, trainer


@pytest.mark.parametrize("workers", [0, 1])
def test_a_replay_of_the_recorded_steps_ends_at_the_same_model(tmp_path, workers):
    options = {"gradient_clip_val": 0.2, "accumulate_grad_batches": 3} if not workers else {}
    model, recorder, _ = fitted(tmp_path, workers, enable_checkpointing=False, **options)
    history = recorder.history(task(model))
    assert len(history) == (4 if not workers else 8)
    assert replayed(task(model), data(), history) < 1e-12
    assert workers or all(bool((s.factors < 1).all()) for s in history.steps())
    uw.SOURCE(1, states=1).fit(task(model), data(), history=history)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_run_goes_on_from_a_checkpoint_and_what_is_unseen_is_refused(tmp_path):
    _, _, trainer = fitted(tmp_path, epochs=1, enable_checkpointing=False)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    model, recorder, _ = fitted(tmp_path, ckpt=tmp_path / "last.ckpt", enable_checkpointing=False)
    history = recorder.history(task(model))
    assert len(history) == 8 and replayed(task(model), data(), history) < 1e-12
    with pytest.raises(SpecError, match="by itself"):
        fitted(tmp_path / "b", gradient_clip_val=1.0, gradient_clip_algorithm="value")
