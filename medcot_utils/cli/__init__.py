"""The commands of `medcot`, and the pages that they serve."""
