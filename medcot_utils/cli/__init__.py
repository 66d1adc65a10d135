"""What a person starts: the commands of `medcot`, and the pages that they serve."""
