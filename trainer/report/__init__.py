"""`python -m trainer.report`: tables over many runs by DomainBed's rules."""
