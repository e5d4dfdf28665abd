"""One folder per framework; none of them knows another, and none holds mathematics."""
