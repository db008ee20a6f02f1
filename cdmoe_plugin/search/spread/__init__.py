"""The spread of a size over all sparse layers: each may stay as it is, keep some experts, or be condensed.

For every layer, on inputs from the unmodified model, the held-out errors of many forms are measured, each fitted in
closed form; one more pass says how much an error of the layer changes the model's output.
"""
