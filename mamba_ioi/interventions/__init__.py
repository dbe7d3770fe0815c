"""What is changed in a run and what is read from it: single runs, sweeps, estimates by gradients, generation."""
