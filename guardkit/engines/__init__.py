"""Who does the work: this process, actors of Ray, or jobs of a Slurm cluster."""
