"""Portable Triton kernels, and the device functions that the Gluon kernels share with them.

Each dimension of variation has one helper: which tile a program computes (`load_work_tile`), which blocks it visits
(`get_block_range`), which scores are visible (`window_mask`, `visible_mask`, `apply_segment_mask`), how a score is
modified (`load_bias`, `apply_score_mod`), which weights dropout keeps (`dropout_keep`). Arguments that are None at
launch remove their code at compile time.

Scores are `[queries, keys]`, or `[keys, queries]` where `TRANSPOSED`. "Rows" are those of the tile (queries, or keys
if transposed), "other" is the side it visits.
"""
