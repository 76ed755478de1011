"""A run: one question about one model, in one directory that can be killed and started again.

    RUN/run.toml          what is asked of what, written before any work (`record.py`)
    RUN/factors/          the curvature while it grows, and finished
    RUN/scores/           S[q, i], in shards or in one piece
    RUN/shown/            what a page shows of the data (`shown.py`)
    RUN/retrained/        models that were trained for a comparison
    RUN/evaluation.json   what the comparison found
    RUN/report.html       the page
    RUN/log.txt           what was done when

`directory.py` opens and locks it, `work.py` does the work, `forecast.py` says what it would take.
Writes are atomic, by one process at a time.
"""
