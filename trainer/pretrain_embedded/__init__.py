"""`python -m trainer.pretrain_embedded`: the weights of the embedded backbone."""
