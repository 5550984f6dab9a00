"""Several processes of ``torch.distributed``: one selection, made and trained together."""
