"""The step `report`: one HTML page made of the JSON documents of a run, and the page of two runs."""
