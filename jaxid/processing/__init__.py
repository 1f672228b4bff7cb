"""What the host does before a network runs: pictures to arrays, family by family."""
