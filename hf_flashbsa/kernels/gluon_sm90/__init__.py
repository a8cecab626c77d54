"""Gluon kernels for Hopper GPUs (sm_90): TMA, wgmma, warp specialisation. dispatch.py selects the calls."""
