"""Makes and trains one selection together in several processes of ``torch.distributed``."""
