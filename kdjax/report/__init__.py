"""What was measured, written for people: an evaluation as one HTML page, a study's ladder, a comparison's trade-off."""
