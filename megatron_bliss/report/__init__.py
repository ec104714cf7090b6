"""What a run says of itself: summary.json and report.html."""
