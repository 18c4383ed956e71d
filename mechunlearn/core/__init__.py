"""What every layer uses: whole files, tensors on disk, run cards, resumable grids, batches, lazy names."""
