"""`python -m trainer.flatness`: Hessian, sharpness and slices of the loss."""
