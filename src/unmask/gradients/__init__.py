"""How gradients reach the slots: taps on the tensors, streamed scoring, calibration."""
