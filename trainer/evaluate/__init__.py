"""`python -m trainer.evaluate`: adapters, ensembles and soups on any domains."""
