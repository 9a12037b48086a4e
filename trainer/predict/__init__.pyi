"""`python -m trainer.predict`, and `predict` for Python: what adapters say to unlabelled images."""

from .job import Prediction as Prediction, predict as predict
