"""A process beside a frozen target model: serves its supervision to the broker."""
