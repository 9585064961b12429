"""A study: a grid of experiments, run one after the other, and what their figures say together.

    grid.py      TOML -> Study -> cells: one experiment and one seed each, keyed by its content
    conduct.py   cells -> folders, resumable; many processes may share one study
    measured.py  folders -> figures      estimate.py  what a study would cost
"""
