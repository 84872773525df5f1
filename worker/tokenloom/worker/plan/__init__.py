"""`tokenloom plan`: which precision, does it fit, how many requests; before there is a GPU.

    config.json, headers ──▶ checkpoint ──▶ sizes ──▶ capacity ──▶ report ──▶ table or JSON
    of safetensors           (files, Hub)   └──────── pure ────────────┘

The memory that a worker leaves aside comes from `tokenloom.worker.memory`, by which it allocates.
Nothing here imports torch.
"""
