"""Commands that are not Trainer loops, one file each."""
