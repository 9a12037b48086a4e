"""Settings by what it means to change them between two starts of a run."""

# Settings that change where or how fast a run computes, and of its result no more than rounding.
# More steps are free as well, since nothing in a step depends on how many follow; and so is the way
# to the base weights, whose hash is compared instead.
FREE = {
    "ds_config", "output_dir", "resume", "data.root", "data.workers",
    "data.cache_dir", "data.cache_gib", "data.fetch_deadline", "data.fetch_retries",
    "data.max_bad_fraction", "model.weights",
    "model.grad_checkpointing", "model.compile", "moa.ep_size", "moa.transport",
    "train.steps", "train.eval_batch", "train.time_limit", "train.skip_nonfinite",
    "train.step_deadline", "checkpoint.every", "checkpoint.keep",
    "checkpoint.background", "checkpoint.allow_changes",
}  # fmt: skip

# Settings that decide which images are trained on and which are tested on.
LEAKING = {"data.held_out", "data.holdout_fraction", "train.trial_seed"}

FIXED = {
    **dict.fromkeys(("data.dataset", "eval.mode"), "its evaluations would not fit together"),
    **dict.fromkeys(
        ("model.backbone", "model.image_size", "model.patch_size", "model.dynamic_size",
         "moa.method", "moa.ranks", "moa.shared_rank", "moa.router",
         "moa.router_dim", "moa.balance", "moa.kron_dim", "moa.targets", "moa.blocks",
         "model.head", "model.head_frozen"),
        "the checkpoint's tensors would not fit the model",
    ),
}  # fmt: skip
"""Settings that no run can change while it lasts, and why."""
