"""The benchmark: every workload on mica and on its peers, in alternation.

`python -m bench` is the one command. The modules, from the bottom up: `child` (forks what is timed),
`roundtrips` (counts FUSE requests), `fixtures` (the layers), `peers` (mount, unmount, watch the
server), `workloads` (what is timed), `report` (medians, ratios, goals, the table), `__main__`.

The one rule: no number stands alone. A result is a ratio against a named peer in the same run.
"""
