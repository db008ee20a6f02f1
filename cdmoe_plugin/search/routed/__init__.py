"""The choice of the experts that stay behind the router of a layer, one method per file.

A method takes the layer's data (`experts.data.RoutedData`) and returns a score for each expert, float64 `[N]`: those
with the highest stay, and experts without tokens (NaN) are the first to go.
"""
