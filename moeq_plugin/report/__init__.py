"""What was done and measured, in files that outlive the run."""
