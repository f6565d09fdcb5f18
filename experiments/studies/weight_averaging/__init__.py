"""What weight_averaging.py alone needs: `study` (options, data, models), `trainings` (choices on val too), `report`."""
