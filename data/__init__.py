"""What needs no model: pairs, trees, baselines, predictions, measures, verdict, report, figures and files.

Importing anything in here imports neither torch nor transformers. `config.py` and the scripts import from here, and
nothing in here imports from them.
"""
