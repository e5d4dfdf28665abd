"""What can be wrong with a checkpoint: a module per kind of check, and the findings they yield."""
