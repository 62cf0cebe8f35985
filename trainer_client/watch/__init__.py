"""What a trainer shows of itself: metrics, and lines in its log."""
