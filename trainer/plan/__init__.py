"""`python -m trainer.plan`: memory, batches and traffic before anything is submitted."""
