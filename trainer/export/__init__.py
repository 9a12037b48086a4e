"""`python -m trainer.export`: an adapter made ready to be shared."""
