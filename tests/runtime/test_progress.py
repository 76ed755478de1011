"""Progress passes its steps on; a bar on a terminal, a line now and then where nobody watches."""

from types import SimpleNamespace

from upweight.runtime import progress as module
from upweight.runtime.progress import progress

STEPS = [(0, 4, "a"), (4, 8, "b"), (8, 9, "c")]


class Bar:
    """What tqdm is asked for."""

    def __init__(self, **options):
        self.options, self.counts, self.is_open = options, [], False
        Bar.last = self

    def __enter__(self):
        self.is_open = True
        return self

    def __exit__(self, *error):
        self.is_open = False

    def update(self, count):
        self.counts.append(count)


def test_steps_pass_through_in_order():
    assert list(progress(iter(STEPS), 9, "scores")) == STEPS


def test_examples_are_counted_after_their_step(monkeypatch):
    monkeypatch.setattr(module, "tqdm", Bar)
    monkeypatch.setattr(module, "_has_bars", lambda: True)
    seen = []
    for step in progress(STEPS, 9, "scores", done=2):
        seen.append((step, list(Bar.last.counts)))
    assert seen == list(zip(STEPS, [[], [4], [4, 4]], strict=True))
    assert Bar.last.counts == [4, 4, 1] and not Bar.last.is_open
    options = Bar.last.options
    assert (options["total"], options["initial"], options["desc"]) == (9, 2, "scores")


def test_the_bar_is_closed_when_the_loop_is_left(monkeypatch):
    monkeypatch.setattr(module, "tqdm", Bar)
    monkeypatch.setattr(module, "_has_bars", lambda: True)
    steps = progress(STEPS, 9, "scores")
    next(steps)
    assert Bar.last.is_open
    steps.close()
    assert not Bar.last.is_open


def test_nothing_is_drawn_where_nobody_watches(capsys):
    for _ in progress(STEPS, 9, "scores"):
        pass
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_long_work_says_a_line_after_ten_seconds_and_every_half_minute(capsys, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    for k, _, _ in progress([(k, k + 1, None) for k in range(2, 20)], 20, "scores", done=2):
        clock.now += 6.0
        assert k >= 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "upweight: scores: 4 of 20 examples after 12 s, about 2 min to go"
    assert [line.split(" of ")[0].split()[-1] for line in lines] == ["4", "9", "14", "19"]
