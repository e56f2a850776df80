"""What surrounds a run and is in no paper: flags, processes, checkpoints, sharding, data sets, parsed answers.

    flags        the values of a script's flags, and where they come from
    run          processes, folder, log, checkpoints
    sharding     a model split over processes
    rollout      answers and what they answer, as data
    updates      which answers share a forward pass, and what becomes of a loss
    problems     data sets by name or by path, checked row by row
    answers      reading an answer; when two answers mean the same
    embedding    texts as vectors
    selections   what VEPO's choice of tokens is compared with
    diagnostics  what a run tells of itself beyond its paper
"""

import os

# Threads that wait for each other spin, and where another process holds a core they spin for nothing: a step of the
# tabletop then takes three times as long. A short spin costs far less there (results/busy.json); this one is what
# OpenMP itself takes when it has more threads than cores. OpenMP reads it once, when torch is loaded: so it stands
# here, and the house's own modules are imported first.  # trap: busy cores
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
