"""Makes docs/results/README.md, its plot and the tables in docs/paper.md from the JSON files in docs/results.

A JSON file holds one run as tools/measure.py records it: machine, commit, date, command, and as `result` what the
command wrote.
"""
