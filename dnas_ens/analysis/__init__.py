"""What a finished search or ensemble is worth: metrics, diversity, significance, and its pictures."""
