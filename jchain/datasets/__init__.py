"""What `jchain.data` cuts data sets into splits and standardizes them with."""
