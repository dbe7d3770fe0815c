"""Models as nnsight traces them: how they are read, checked, and what is known of their parts."""
