"""Where questions, clips and teacher trajectories come from."""
