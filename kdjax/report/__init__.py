"""Reports for people: an evaluation as one HTML page, a study's ladder of methods, a comparison's trade-off."""
